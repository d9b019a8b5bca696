"""What every sample of a cache has in common: the content of identity.json."""

from __future__ import annotations

from dataclasses import asdict, replace

from prep.encode.networks import Encoders
from prep.encode.settings import Settings
from shared.cache.identity import ADDED, Identity, Preprocessing, Shapes, TextIdentity, VaeIdentity
from shared.cache.layout import Layout, cache_layout
from shared.cache.paths import FORMAT
from shared.models.family import Model

SIGNS = ("fingerprint", "fingerprints", *ADDED)  # by which an encoder is known


def build_identity(
    model: Model, encoders: Encoders, settings: Settings, shapes: Shapes, generation: int = 0
) -> Identity:
    """Build the content of identity.json; `generation` counts --overwrite."""
    vae, own = encoders.vae, encoders.vae.source == model.source
    return Identity(
        FORMAT, model.family.name, model.source, "posterior" if settings.keep_logvar else "mean",
        replace(vae.identity(), source=None if own else vae.source), encoders.text.identity(),
        Preprocessing(
            **settings.framing.to_json(),
            max_captions=settings.max_captions,
            where=settings.filters.where,
            max_pwatermark=settings.filters.max_pwatermark,
            shuffle=asdict(settings.shuffle) if settings.shuffle else None,
        ),
        shapes, generation,
    )  # fmt: skip


def same_encoder(recorded: VaeIdentity | TextIdentity, here: VaeIdentity | TextIdentity) -> bool:
    """Are these the weights, tokenizers and settings that a cache records, as far as it does?"""
    known = ((getattr(recorded, name, None), name) for name in SIGNS)
    return all(getattr(here, name) == value for value, name in known if value is not None)


def expected_layout(encoders: Encoders, settings: Settings) -> Layout:
    """Derive the layout of samples of these settings; with buckets, of the square ones."""
    channels = encoders.vae.channels * (2 if settings.keep_logvar else 1)
    side = settings.framing.resolution // encoders.vae.downscale
    pooled = encoders.text.pooled_width
    return cache_layout(
        (settings.framing.views, channels, side, side),
        (settings.max_captions, encoders.text.length, encoders.text.width),
        None if pooled is None else (settings.max_captions, pooled),
        micro_conditioning=pooled is not None,
    )
