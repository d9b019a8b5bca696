"""Which encoders fill a cache, on which device, in which batch shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prep.config import EncodeConfig
from prep.encoders.text import TextEncoder
from prep.encoders.vae import VaeEncoder
from shared.errors import UserError
from shared.machine import cpus
from shared.machine.device import pick_device, set_threads
from shared.models.family import (
    Model,
    recorded_model,
    unet_config,
)


@dataclass(frozen=True)
class Encoders:
    """The frozen networks."""

    vae: VaeEncoder
    text: TextEncoder


@dataclass(frozen=True)
class Shapes:
    """Batch shapes and threads: with them the encoders give the same bytes every time.

    `device` is the kind alone: which of a machine's GPUs it is makes no difference. `threads` are
    a CPU's; where a GPU computes they decide nothing, and each process takes what it may use.
    """

    vae_batch_size: int
    text_batch_size: int
    threads: int | None
    device: str

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Shapes:
        """As an identity records them."""
        threads = stored.get("threads") if stored["device"] == "cpu" else None
        return Shapes(
            stored["vae_batch_size"], stored["text_batch_size"], threads, stored["device"]
        )

    def to_json(self) -> dict[str, Any]:
        """For the cache's identity."""
        return {name: value for name, value in vars(self).items() if value is not None}


def choose_device(config: EncodeConfig, stored: Mapping[str, Any]) -> torch.device:
    """The flag, else the kind that the cache was begun on, else a GPU where there is one.

    `stored` is what the cache's identity.json says, here and below; empty where there is none.
    Raises UserError for a device that is not here.
    """
    if config.device != "auto" or not stored:
        return pick_device(config.device)
    kind = stored["shapes"]["device"]
    try:
        return pick_device(kind)
    except UserError:
        raise UserError(
            f"{config.cache} was begun on {kind}, which decides its bytes, and there is none "
            "here; go on where there is one, or choose another --cache"
        ) from None


def choose_shapes(
    config: EncodeConfig, stored: Mapping[str, Any], device: torch.device, resolution: int
) -> Shapes:
    """The flags, else what the cache was begun with, else defaults."""
    begun = stored.get("shapes", {})
    threads = config.threads or begun.get("threads") or config.cpus_per_worker or cpus.threads()
    return Shapes(
        config.vae_batch_size
        or begun.get("vae_batch_size", default_vae_batch_size(device, resolution)),
        config.text_batch_size or begun.get("text_batch_size", 32),
        threads if device.type == "cpu" else None,
        device.type,
    )


def taken_over(config: EncodeConfig, stored: Mapping[str, Any]) -> str:
    """A line where the cache was begun on a machine so unlike this one that it is slow here."""
    if not stored:
        return ""
    begun, here = stored["shapes"], cpus.threads()
    if begun["device"] == "cpu" and config.device == "auto" and pick_device("auto").type != "cpu":
        return (
            f"note: {config.cache} was begun on a CPU, which decides its bytes, so the GPU here "
            "is not used; a cache for it is another --cache, or begins with --overwrite --device"
        )
    threads = begun.get("threads") or 0
    if begun["device"] == "cpu" and config.threads is None and threads > here:
        return (
            f"note: {config.cache} was begun with {threads} threads, which decide its bytes; they "
            f"share {here} here and are slow; for unlike machines begin a cache with "
            f"--threads {here}"
        )
    return ""


def default_vae_batch_size(device: torch.device, resolution: int) -> int:
    """On a GPU 16 pictures of 512 px, or as many larger ones as have so many pixels."""
    if device.type == "cpu":
        return 8
    return min(16, max(1, 16 * 512**2 // resolution**2))


@dataclass(frozen=True)
class VaeChoice:
    """Which VAE encodes, in what, and its stream's scale (None until it is calibrated)."""

    source: str
    dtype: str
    rescale: float | None


def choose_vae(
    config: EncodeConfig, stored: Mapping[str, Any], model: Model, device: str
) -> VaeChoice:
    """The flags, else what the cache was begun with, else the model's VAE."""
    begun = stored.get("vae", {})
    default = "float16" if device == "cuda" else "float32"
    dtype = begun.get("dtype", default) if config.vae_dtype == "auto" else config.vae_dtype
    return VaeChoice(
        config.vae
        or (recorded_model(str(begun["source"]), "--vae") if "source" in begun else model.source),
        dtype,
        begun.get("rescale") if dtype == begun.get("dtype") else None,
    )


def load_encoders(
    model: Model, shapes: Shapes, vae: VaeChoice, clip_skip: int, device: torch.device
) -> Encoders:
    """Both encoders on `device`, with the recorded batch shapes and number of threads.

    Raises UserError for a VAE whose latents the model does not take.
    """
    set_threads(shapes.threads)
    torch.backends.cudnn.allow_tf32 = False  # torch's default: 10 bits where fp32 has 23
    encoder = VaeEncoder(vae.source, device, shapes.vae_batch_size, vae.dtype, vae.rescale)
    wanted = unet_config(model.source)["in_channels"]
    if encoder.channels != wanted:
        remedy = "pass a VAE made for this model"
        if vae.source == model.source:
            remedy = "one that also takes a picture or a mask is no teacher: pass its base model"
        raise UserError(
            f"{vae.source}: its VAE's latents have {encoder.channels} channels, the UNet of "
            f"{model.source} takes {wanted}; {remedy}"
        )
    return Encoders(encoder, TextEncoder(model, device, shapes.text_batch_size, clip_skip))
