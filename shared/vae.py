"""The VAE both stages use: prep encodes with it, train decodes previews with it."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from shared.errors import UserError


def load_vae(source: str) -> AutoencoderKL:
    """A model's VAE, fp32, frozen, channels last. Raises UserError where there is none."""
    try:
        vae = AutoencoderKL.from_pretrained(
            source, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"no VAE can be read from {source!r} ({first})") from None
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.inference_mode()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> NDArray[np.uint8]:
    """Raw, unscaled latents `[N, C, h, w]` to RGB pixels `[N, H, W, 3]`."""
    return to_pixels(vae.decode(latents.to(vae.device, vae.dtype)).sample)


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """`[N, 3, H, W]` in [-1, 1] to uint8 `[N, H, W, 3]`, as diffusers' image processor rounds."""
    unit = (images.float() / 2 + 0.5).clamp(0, 1)
    pixels: NDArray[np.uint8] = (
        (unit * 255).round().permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
    )
    return pixels
