"""Publishing an export on the Hugging Face hub. The token is used, and neither kept nor shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from shared.errors import UserError, first_line
from train.flag_groups import PublishFlags

# What belongs to an export; checkpoints, metrics and the cache's path stay at home.
WEIGHTS = {
    "lora": ["pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"],
    "full": ["unet/*"],
    "standalone": ["unet/*", "student.safetensors", "student.fp16.safetensors"],
}
BESIDE = ["README.md", "preview.png", "scheduler/*"]
EVALUATION = ["evaluation.md", "evaluation.png"]  # the .json names a cache
REMEDIES = {
    401: "the hub does not accept the token: `hf auth login`, or another --hub-token",
    403: "the token may not write there: take one with write access, or another --hub-model-id",
    404: "there is no such account or repository: check --hub-model-id",
}


def check_push(config: PublishFlags, run: Path) -> None:
    """Raise UserError for flags that could not publish, before any work is done."""
    if not config.push_to_hub:
        for flag in ("hub_model_id", "hub_token"):
            if getattr(config, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')} does nothing without --push-to-hub")
        return
    if not (config.hub_token or get_token()):
        raise UserError(
            "--push-to-hub needs a token with write access: `hf auth login`, HF_TOKEN in the "
            "environment, or --hub-token"
        )
    try:
        validate_repo_id(model_id(config, run))
    except HFValidationError as error:
        first = first_line(error)
        raise UserError(f"--hub-model-id {model_id(config, run)!r}: {first}") from None


def model_id(config: PublishFlags, run: Path) -> str:
    """The repository's name; that of the run unless given, under the token's own account."""
    return config.hub_model_id or run.resolve().name


def push(
    config: PublishFlags, run: Path, folder: Path, student: str, write_card: Callable[[str], bool]
) -> str:
    """Make the repository, let `write_card` name it, upload the export; returns the address.

    Of the folder goes what belongs to this kind of export (`WEIGHTS`), the evaluation if
    `write_card` says that it is the student's.

    Raises UserError, in a line, for whatever the hub refuses; the export stays where it is.
    """
    api = HfApi(token=config.hub_token)
    try:
        repo = api.create_repo(model_id(config, run), exist_ok=True)
        evaluated = write_card(repo.repo_id)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            allow_patterns=[*WEIGHTS[student], *BESIDE, *(EVALUATION if evaluated else [])],
            commit_message="Publish a distilled student",
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--push-to-hub: {cause(error)}; the student is safe in {folder}, and "
            f"`python -m train export --run {run} --push-to-hub --hub-model-id "
            f"{model_id(config, run)}` publishes it"
        ) from None
    return str(repo)


def cause(error: Exception) -> str:
    """A hub error in half a line, with its remedy where one is known."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in REMEDIES:
        return REMEDIES[status]
    first = first_line(error)
    unreached = status is None and isinstance(error, HTTPError | OSError)
    return f"the hub cannot be reached ({first}); check the connection" if unreached else first
