"""What every sample of a cache has in common, and the encoders that make it so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prep.buckets import choose_buckets
from prep.config import EncodeConfig
from prep.filters import Filters
from prep.images import Framing
from prep.pipeline import Encoders, Settings
from prep.text import TextEncoder
from prep.vae import VaeEncoder
from shared.cache import FORMAT, CachePaths
from shared.conditioning import TextEmbeds
from shared.device import pick_device, set_threads
from shared.errors import UserError
from shared.family import Model, force_zeros, load_config, recorded_model
from shared.identity import ADDED, OtherSettings, claim_identity
from shared.layout import Layout, cache_layout
from shared.storage import load_json


@dataclass(frozen=True)
class Shapes:
    """Batch shapes and threads: with them the encoders give the same bytes every time.

    `device` is the kind alone: which of a machine's GPUs it is makes no difference.
    """

    vae_batch_size: int
    text_batch_size: int
    threads: int
    device: str


def choose_device(config: EncodeConfig, cache: CachePaths) -> torch.device:
    """The flag, else the kind that the cache was begun on, else a GPU where there is one."""
    if config.device == "auto" and cache.identity.exists():
        return pick_device(load_json(cache.identity)["shapes"]["device"])
    return pick_device(config.device)


def choose_shapes(
    config: EncodeConfig, cache: CachePaths, device: torch.device, resolution: int
) -> Shapes:
    """The flags, else what the cache was begun with, else defaults."""
    stored = load_json(cache.identity)["shapes"] if cache.identity.exists() else {}
    default = default_vae_batch_size(device, resolution)
    return Shapes(
        config.vae_batch_size or stored.get("vae_batch_size", default),
        config.text_batch_size or stored.get("text_batch_size", 32),
        config.threads or stored.get("threads") or config.cpus_per_worker or os.cpu_count() or 1,
        device.type,
    )


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


def choose_vae(config: EncodeConfig, cache: CachePaths, model: Model, device: str) -> VaeChoice:
    """The flags, else what the cache was begun with, else the model's VAE."""
    stored = load_json(cache.identity)["vae"] if cache.identity.exists() else {}
    default = "float16" if device == "cuda" else "float32"
    dtype = stored.get("dtype", default) if config.vae_dtype == "auto" else config.vae_dtype
    return VaeChoice(
        config.vae
        or (recorded_model(str(stored["source"]), "--vae") if "source" in stored else model.source),
        dtype,
        stored.get("rescale") if dtype == stored.get("dtype") else None,
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
    wanted = load_config(model.source, "unet/config.json")["in_channels"]
    if vae.source != model.source and encoder.channels != wanted:
        raise UserError(
            f"--vae {vae.source}: its latents have {encoder.channels} channels, "
            f"{model.source} takes {wanted}; pass a VAE made for this model"
        )
    return Encoders(encoder, TextEncoder(model, device, shapes.text_batch_size, clip_skip))


def choose_settings(config: EncodeConfig, model: Model, keep_logvar: bool) -> Settings:
    """Flags and the family's defaults. Raises UserError for those that do not go together."""
    resolution = model.family.resolution if config.resolution is None else config.resolution
    framing = choose_framing(config, resolution)
    filters = Filters(config.where, config.max_pwatermark)
    return Settings(framing, keep_logvar, config.max_captions, filters, config.clip_skip)


def choose_framing(config: EncodeConfig, resolution: int) -> Framing:
    """What the flags make of a picture. Raises UserError for a resolution the VAE cannot take."""
    if resolution % 8 or resolution <= 0:
        raise UserError(f"--resolution {resolution} is not a multiple of 8")
    random = config.random_crop or config.random_flip
    if config.views > 1 and not random:
        raise UserError(
            f"--views {config.views}: all would be equal; add --random-crop or --random-flip"
        )
    buckets = None
    table = (config.bucket_reso_steps, config.min_bucket_reso, config.max_bucket_reso)
    if config.buckets:
        buckets = choose_buckets(resolution, *table, config.bucket_no_upscale)
    elif config.bucket_no_upscale or any(value is not None for value in table):
        raise UserError("the flags about bucket sizes need --buckets")
    crop = "center" if config.center_crop else "corner"
    return Framing(
        resolution,
        "random" if config.random_crop else crop,
        config.random_flip,
        config.views,
        config.seed if random else 0,  # which decides nothing otherwise
        config.min_size,
        buckets,
    )


def build_identity(
    model: Model, encoders: Encoders, settings: Settings, shapes: Shapes, generation: int = 0
) -> dict[str, Any]:
    """The content of identity.json; `generation` counts what --overwrite did (shared.identity)."""
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
            **settings.framing.to_json(),
            "max_captions": settings.max_captions,
            "where": settings.filters.where,
            "max_pwatermark": settings.filters.max_pwatermark,
        },
        "shapes": vars(shapes),
        **({"generation": generation} if generation else {}),
    }


def same_encoder(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Are these the weights, tokenizers and settings that a cache records, as far as it does?"""
    names = ("fingerprint", "fingerprints", *ADDED)
    return all(recorded[name] == here[name] for name in names if name in recorded)


def claim(
    cache: CachePaths, model: Model, encoders: Encoders, settings: Settings, shapes: Shapes,
    begun: bool, generation: int = 0,
) -> None:  # fmt: skip
    """Begin the cache, or check that it was begun with the same settings (UserError).

    Of several processes that begin a cache at once the first one's calibration counts: where
    another's gave another scale, it takes over the recorded one. `begun` says that this one found
    a cache, and so its scale, from the first.
    """
    remedy = (
        "give the same flags and model, or another --cache, or replace what is there "
        "with --overwrite"
    )
    try:
        claim_identity(cache, build_identity(model, encoders, settings, shapes, generation), remedy)
    except OtherSettings:
        recorded = load_json(cache.identity)["vae"]
        if begun or recorded["dtype"] != encoders.vae.dtype:
            raise
        encoders.vae.rescale_by(recorded["rescale"])
        claim_identity(cache, build_identity(model, encoders, settings, shapes, generation), remedy)


def expected_layout(encoders: Encoders, settings: Settings) -> Layout:
    """What samples of these settings will look like; with buckets, those that are square."""
    channels = encoders.vae.channels * (2 if settings.keep_logvar else 1)
    side = settings.framing.resolution // encoders.vae.downscale
    pooled = encoders.text.pooled_width
    return cache_layout(
        (settings.framing.views, channels, side, side),
        (settings.max_captions, encoders.text.length, encoders.text.width),
        None if pooled is None else (settings.max_captions, pooled),
        micro_conditioning=pooled is not None,
    )


def unconditional(model: Model, encoder: TextEncoder) -> TextEmbeds:
    """The empty prompt's embedding as this model wants it, one row."""
    return encoder.unconditional(force_zeros(model))
