"""The LoRAs to merge: found, read for the model that they are for, and joined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from infer.pipelines.loras import find_lora
from shared.errors import UsageError, UserError
from shared.models.family import Model, recorded_model, resolve_model
from shared.models.lora_files import read_lora
from shared.networks.denoiser import Denoiser
from shared.networks.styled import Lora, join, misfit, scaled
from shared.storage.files import file_sha256
from shared.style import Style, split_scale
from train.state.run_config import run_config


def find_loras(texts: Sequence[str]) -> tuple[Style, ...]:
    """Find the files that `FILE[:SCALE]` name; a folder stands for the LoRA that a run exported.

    Raises UsageError for none, and UserError for one that is not there.
    """
    if not texts:
        raise UsageError(
            "which LoRAs? For example: python -m infer merge style.safetensors:0.8 runs/sdxl-lora"
        )
    files = [find_lora(text, "the LoRA") for text in texts]
    return tuple(Style(str(one.path), one.scale, file_sha256(one.path)) for one in files)


def find_model(name: str | None, texts: Sequence[str]) -> Model:
    """The model that the LoRAs are for: the one named, else the teacher of the first run.

    Raises UsageError where nothing tells.
    """
    folders = [Path(split_scale(text)[0]) for text in texts]
    run = next((path for path in folders if (path / "config.json").is_file()), None)
    if name is None and run is not None:
        name = recorded_model(run_config(run).model)
    if name is None:
        raise UsageError("which model are these LoRAs for? Say --model sdxl, sd15, or where it is")
    return resolve_model(name)


def join_loras(loras: Sequence[Style], model: str, unet: Denoiser) -> Lora:
    """Read the LoRAs as one, their scales multiplied in: what it adds is what all of them add.

    The `unet` needs no weights. Raises UserError for a LoRA of another kind of model, and where
    nothing is left to add.
    """
    joined: Lora = {}
    for lora in loras:
        tensors = read_lora(Path(lora.file), unet.config)
        if layer := misfit(tensors, unet):
            raise UserError(
                f"{lora.file} is not for {model}: its layer {layer} does not fit; merge LoRAs of "
                "one kind of model, and name that as --model"
            )
        joined = join(joined, scaled(tensors, lora.scale))
        if not all(tensor.isfinite().all() for tensor in joined.values()):
            raise UserError(
                f"{lora.file} at {lora.scale:g} has numbers that fp32 cannot hold; give a smaller "
                "scale"
            )
    return joined
