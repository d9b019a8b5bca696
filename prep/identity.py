"""What every sample of a cache has in common, and the encoders that make it so."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from prep.config import EncodeConfig
from prep.filters import Filters
from prep.pipeline import Encoders, Settings
from prep.text import TextEncoder
from prep.vae import VaeEncoder
from shared.cache import FORMAT, CachePaths
from shared.conditioning import TextEmbeds
from shared.device import pick_device, set_threads
from shared.errors import UserError
from shared.family import Model, load_config
from shared.layout import Layout, cache_layout
from shared.storage import load_json


@dataclass(frozen=True)
class Shapes:
    """Batch shapes and threads: with them the encoders give the same bytes every time."""

    vae_batch_size: int
    text_batch_size: int
    threads: int
    device: str


def choose_shapes(config: EncodeConfig, cache: CachePaths) -> Shapes:
    """The flags, else what the cache was begun with, else defaults."""
    stored = load_json(cache.identity)["shapes"] if cache.identity.exists() else {}
    device = pick_device(stored.get("device", "auto") if config.device == "auto" else config.device)
    default = 8 if device.type == "cpu" else 16
    return Shapes(
        config.vae_batch_size or stored.get("vae_batch_size", default),
        config.text_batch_size or stored.get("text_batch_size", 32),
        config.threads or stored.get("threads") or config.cpus_per_worker or os.cpu_count() or 1,
        device.type,
    )


@dataclass(frozen=True)
class VaeChoice:
    """Which VAE encodes, in what, and its stream's scale (None until it is calibrated)."""

    source: str
    dtype: str
    rescale: float | None


def choose_vae(config: EncodeConfig, cache: CachePaths, model: Model, device: str) -> VaeChoice:
    """The flags, else what the cache was begun with, else the model's VAE."""
    stored = load_json(cache.identity)["vae"] if cache.identity.exists() else {}
    default = "float16" if device == "cuda" else "float32"
    dtype = stored.get("dtype", default) if config.vae_dtype == "auto" else config.vae_dtype
    return VaeChoice(
        config.vae or stored.get("source", model.source),
        dtype,
        stored.get("rescale") if dtype == stored.get("dtype") else None,
    )


def load_encoders(model: Model, shapes: Shapes, vae: VaeChoice) -> Encoders:
    """Both encoders on the recorded device, with the recorded number of threads.

    Raises UserError for a VAE whose latents the model does not take.
    """
    set_threads(shapes.threads)
    device = pick_device(shapes.device)
    encoder = VaeEncoder(vae.source, device, shapes.vae_batch_size, vae.dtype, vae.rescale)
    wanted = load_config(model.source, "unet/config.json")["in_channels"]
    if vae.source != model.source and encoder.channels != wanted:
        raise UserError(
            f"--vae {vae.source}: its latents have {encoder.channels} channels, "
            f"{model.source} takes {wanted}; pass a VAE made for this model"
        )
    return Encoders(encoder, TextEncoder(model, device, shapes.text_batch_size))


def choose_settings(config: EncodeConfig, model: Model, keep_logvar: bool) -> Settings:
    """Flags and the family's defaults. Raises UserError for a resolution the VAE cannot take."""
    resolution = config.resolution or model.family.resolution
    if resolution % 8 or resolution <= 0:
        raise UserError(f"--resolution {resolution} is not a multiple of 8")
    if config.max_captions < 1:
        raise UserError("--max-captions must be at least 1")
    filters = Filters(config.where, config.max_pwatermark)
    return Settings(resolution, config.center_crop, keep_logvar, config.max_captions, filters)


def build_identity(
    model: Model, encoders: Encoders, settings: Settings, shapes: Shapes
) -> dict[str, Any]:
    """The content of identity.json."""
    vae = encoders.vae.identity()
    if encoders.vae.source != model.source:
        vae["source"] = encoders.vae.source
    return {
        "format": FORMAT,
        "family": model.family.name,
        "model": model.source,
        "vae": vae,
        "text": {**encoders.text.identity(), "force_zeros": force_zeros(model)},
        "latents": "posterior" if settings.keep_logvar else "mean",
        "preprocessing": {
            "resolution": settings.resolution,
            "center_crop": settings.center_crop,
            "max_captions": settings.max_captions,
            "views": 1,
            "where": settings.filters.where,
            "max_pwatermark": settings.filters.max_pwatermark,
        },
        "shapes": vars(shapes),
    }


def expected_layout(encoders: Encoders, settings: Settings) -> Layout:
    """What samples of these settings will look like."""
    channels = encoders.vae.channels * (2 if settings.keep_logvar else 1)
    side = settings.resolution // encoders.vae.downscale
    pooled = encoders.text.pooled_width
    return cache_layout(
        (1, channels, side, side),
        (settings.max_captions, encoders.text.length, encoders.text.width),
        None if pooled is None else (settings.max_captions, pooled),
        micro_conditioning=pooled is not None,
    )


def force_zeros(model: Model) -> bool:
    """Is the unconditional embedding zeros? The model's own `force_zeros_for_empty_prompt`."""
    index = load_config(model.source, "model_index.json")
    return bool(index.get("force_zeros_for_empty_prompt", False))


def unconditional(model: Model, encoder: TextEncoder) -> TextEmbeds:
    """The empty prompt's embedding as this model wants it, one row."""
    return encoder.unconditional(force_zeros(model))
