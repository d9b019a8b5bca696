"""What every sample of a cache has in common: the content of identity.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prep.encode.networks import Encoders, Shapes
from prep.encode.settings import Settings
from prep.encoders.text import TextEncoder
from shared.cache.conditioning import TextEmbeds
from shared.cache.identity import ADDED
from shared.cache.layout import Layout, cache_layout
from shared.cache.manifest import FORMAT
from shared.models.family import (
    Model,
    force_zeros,
)


def build_identity(
    model: Model, encoders: Encoders, settings: Settings, shapes: Shapes, generation: int = 0
) -> dict[str, Any]:
    """The content of identity.json; `generation` counts --overwrite (shared.cache.identity)."""
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
            **({"shuffle": settings.shuffle.to_json()} if settings.shuffle else {}),
        },
        "shapes": shapes.to_json(),
        **({"generation": generation} if generation else {}),
    }


def same_encoder(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Are these the weights, tokenizers and settings that a cache records, as far as it does?"""
    names = ("fingerprint", "fingerprints", *ADDED)
    return all(recorded[name] == here[name] for name in names if name in recorded)


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
