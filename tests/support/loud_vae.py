"""VAEs whose activations leave fp16's range, and pictures that drive them there."""

import numpy as np
from diffusers import AutoencoderKL

from tests.support.sources import (
    TINY_SD,
    samples,
)


def model_with(vae, folder):
    """tiny-sd with another VAE."""
    folder.mkdir()
    for part in TINY_SD.iterdir():
        if part.name != "vae":
            (folder / part.name).symlink_to(part)
    vae.save_pretrained(folder / "vae")
    return folder


def loud_vae(factor=3000.0):
    """tiny-sd's with a stream far beyond fp16: conv_in and what the residual blocks add."""
    vae = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae").requires_grad_(False)
    for name, weight in vae.state_dict().items():
        if any(part in name for part in ("conv_in", "conv2", "to_out.0", "shortcut.bias")):
            weight.mul_(factor)
    return vae


def latents_of(cache):
    found = samples(cache)
    return np.stack([found[key].arrays["latents"] for key in sorted(found)]).astype(np.float64)
