"""All of a model but its UNet, as one file in the original layout has it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shared.errors import UserError
from shared.models.family import SCHEDULER_CONFIG, Model, load_config
from shared.models.hub import hub_file
from shared.models.original_layout import UNET, VAE, original_encoder, original_vae
from shared.models.rescale import plain_vae
from shared.models.single_file import is_single_file
from shared.models.vae import load_vae
from shared.storage.tensors import load_tensors

AVERAGE = "model_ema."  # the UNet's, in the files of old training runs
ENCODER_FILES = ("model.safetensors", "model.fp16.safetensors")
REMEDY = "fetch the model anew"


def beside_unet(model: Model, vae: str | None = None) -> dict[str, Tensor]:
    """Return VAE, text encoders and marks of a model, `vae` in its own VAE's place.

    Of a model in one file they are taken as they are. Raises UserError where a part is missing.
    """
    if is_single_file(model.source):
        tensors = load_tensors(Path(model.source), REMEDY)
        left_out = (UNET, AVERAGE, *([VAE] if vae else []))
        found = {name: t for name, t in tensors.items() if not name.startswith(left_out)}
        return found | (vae_part(vae) if vae else {})
    found = vae_part(vae or model.source)
    family = model.family
    for part, prefix in zip(family.text_encoders, family.original_encoders, strict=True):
        found |= original_encoder(encoder_tensors(model.source, part), prefix)
    return found | marks(model)


def vae_part(source: str) -> dict[str, Tensor]:
    """Return a VAE's weights; one that was rescaled for fp16 as it was before."""
    return original_vae(plain_vae(load_vae(source)).state_dict())


def encoder_tensors(source: str, part: str) -> dict[str, Tensor]:
    """Return the weights of a text encoder, of a folder here or of the hub."""
    if not Path(source).is_dir():
        return load_tensors(hub_file(source, f"{part}/{ENCODER_FILES[0]}"), REMEDY)
    files = [Path(source, part, name) for name in ENCODER_FILES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(
            f"{source} has no {part}/{ENCODER_FILES[0]}, which the one file is to hold; {REMEDY}"
        )
    return load_tensors(file, REMEDY)


def marks(model: Model) -> dict[str, Tensor]:
    """Return the empty keys by which an SDXL that predicts v is told from its weights' names."""
    if not model.family.micro_conditioning:
        return {}
    scheduler = load_config(model.source, SCHEDULER_CONFIG)
    said = {
        "v_pred": scheduler.get("prediction_type") == "v_prediction",
        "ztsnr": bool(scheduler.get("rescale_betas_zero_snr")),
    }
    return {name: torch.zeros(1) for name, is_so in said.items() if is_so}
