"""Where the weights of a measure are: a folder, or what the hub has under a name."""

from __future__ import annotations

from pathlib import Path

from shared.errors import UserError, first_line
from shared.models.family import HUB_ID
from shared.models.hub import unreachable

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
PICTURES, TOKENS = "preprocessor_config.json", ("tokenizer.json", "vocab.json")
PROCESSOR = [PICTURES, *TOKENS, "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]


def weights_folder(asked: str, source: str, published: str) -> Path:
    """The folder with the config and the weights that `source`, a folder or hub id, stands for.

    `asked` is the flag with its value less the source (`--features clip`), `published` the hub id
    of what is usual. Raises UserError, with what to put where, if there is none.
    """
    folder = found_folder(asked, source, [CONFIG, "model*.safetensors", WEIGHTS[1]])
    if not has_weights(folder) and not Path(source).is_dir():
        folder = found_folder(asked, source, [CONFIG, WEIGHTS[-1]])  # an older repository
    missing = [] if (folder / CONFIG).is_file() else [CONFIG]
    missing += [] if has_weights(folder) else [WEIGHTS[0]]
    if missing:
        raise UserError(
            f"{asked}: {folder} has no {' and no '.join(missing)}; put those of {published} there "
            f"(hf download {published} --local-dir FOLDER), then {asked}:FOLDER"
        )
    return folder


def processor_folder(asked: str, source: str, published: str) -> Path:
    """The folder with the tokenizer and the settings for pictures. Raises UserError likewise."""
    folder = found_folder(asked, source, PROCESSOR)
    tokens = TOKENS[0] if not any((folder / name).is_file() for name in TOKENS) else None
    missing = [name for name in (PICTURES, tokens) if name and not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{asked}: {folder} has no {' and no '.join(missing)}; put those of {published} there"
        )
    return folder


def has_weights(folder: Path) -> bool:
    """Is one of the files there that transformers reads weights from?"""
    return any((folder / name).is_file() for name in WEIGHTS)


def found_folder(asked: str, source: str, patterns: list[str]) -> Path:
    """The folder, or where the hub's files that match `patterns` are on this machine.

    They are downloaded if need be. Raises UserError where that cannot be.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(source):
        raise UserError(f"{asked}:{source}: there is no folder {source}, nor is that a hub id")
    away = unreachable()
    from huggingface_hub import snapshot_download  # slow to import, so only now

    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        why = away or first_line(error)
    raise UserError(
        f"{asked}: {source!r} is not on this machine and cannot be had from the hub ({why}); where "
        f"there is a network: hf download {source} --local-dir FOLDER; then {asked}:FOLDER"
    )
