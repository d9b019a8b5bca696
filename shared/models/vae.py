"""The VAE both stages use: prep encodes with it, train decodes previews with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError, first_line
from shared.models.hub import unreachable
from shared.models.rescale import RESCALE_FILE, restore
from shared.models.single_file import is_single_file, load_part
from shared.models.weights import load_whole
from shared.storage.files import load_record

DECODED = 25  # latents decoded at once, at most
DECODED_VALUES = 128 * 128  # of one channel, over all of them


def load_vae(source: str) -> AutoencoderKL:
    """Load a VAE, fp32, frozen, channels last: a model's (folder, hub id, one file), or a VAE's.

    One that `save_rescaled` wrote comes back as it was. Raises UserError where there is none.
    """
    if is_single_file(source):
        return _ready(load_part(AutoencoderKL, source, "vae"), source)
    if not Path(source).is_dir():
        if source.count("/") != 1:
            raise UserError(
                f"no VAE can be read from {source!r} (neither a folder here nor a hub id, "
                "owner/name)"
            )
        unreachable()  # with no hub, only what was downloaded before is looked for
    try:
        folder = _subfolder(source)
        rescale = _find(source, folder, RESCALE_FILE)
    except (OSError, ValueError) as error:
        raise UserError(f"no VAE can be read from {source!r} ({first_line(error)})") from None
    vae = load_whole(
        AutoencoderKL.from_pretrained, source, "VAE",
        subfolder=folder, torch_dtype=torch.float32, use_safetensors=True,
    )  # fmt: skip
    if rescale is not None:
        restore(vae, rescale)
    return _ready(vae, source)


def _ready(vae: AutoencoderKL, source: str) -> AutoencoderKL:
    for name in ("latents_mean", "latents_std", "shift_factor"):  # of others than Stable Diffusion
        if vae.config.get(name) is not None:
            raise UserError(
                f"{source}: its VAE's latents are shifted ({name} in its config.json), which no "
                "model that can be a teacher here expects"
            )
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _subfolder(source: str) -> str:
    """Return `vae` in a whole model, nothing where `source` itself is a VAE."""
    if _find(source, "vae", "config.json") is not None:
        return "vae"
    config = _find(source, "", "config.json")
    if config is None:
        return "vae"  # which is what the error will name
    kind = load_record(config, dict, "fetch the VAE anew").get("_class_name")
    if kind != "AutoencoderKL":
        raise UserError(f"{source!r} holds a {kind}, not an AutoencoderKL; pass a VAE or a model")
    return ""


def _find(source: str, folder: str, name: str) -> Path | None:
    """Return a file of a model, here or on the hub; None where it has none of that name."""
    if Path(source).is_dir():
        local = Path(source, folder, name)
        return local if local.is_file() else None
    try:
        return Path(hf_hub_download(source, name, subfolder=folder or None))
    except EntryNotFoundError:
        return None


@torch.inference_mode()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> NDArray[np.uint8]:
    """Decode raw, unscaled latents `[N, C, h, w]` to RGB pixels `[N, H, W, 3]`, a few at a time."""
    parts = torch.split(latents, decoded_at_once(latents.shape[-2], latents.shape[-1]))
    decoded = (vae.decode(part.to(vae.device, vae.dtype)).sample for part in parts)
    return np.concatenate([to_pixels(images) for images in decoded])


def decoded_at_once(height: int, width: int) -> int:
    """Return how many latents of a size: 25 small ones, 4 of 64 x 64, one of 128 x 128.

    In fp32 a picture of 1024 px takes some 4 GB while it is decoded.
    """
    return min(DECODED, max(1, DECODED_VALUES // (height * width)))


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Turn `[N, 3, H, W]` in [-1, 1] into uint8 `[N, H, W, 3]`, rounded as diffusers does."""
    unit = (images.float() / 2 + 0.5).clamp(0, 1)
    pixels: NDArray[np.uint8] = (
        (unit * 255).round().permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
    )
    return pixels
