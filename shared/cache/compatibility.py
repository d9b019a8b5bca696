"""Does a cache that someone else made hold what this teacher is trained on, and what it says?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.cache.layout import Field, Layout
from shared.cache.manifest import Manifest
from shared.errors import UserError

TIME_IDS = 6


def check_fit(manifest: Manifest, family: str, unet: Mapping[str, Any], cache: Any) -> None:
    """Raise UserError, naming both sides, where the cache was made for another kind of teacher.

    `family` and the config `unet` are the teacher's.
    """
    identity = manifest.identity
    pairs = {
        "family": (identity.family, family),
        "latent channels": (identity.vae.channels, unet["in_channels"]),
        "embedding width": (identity.text.width, unet["cross_attention_dim"]),
    }
    for what, (here, wanted) in pairs.items():
        if here != wanted:
            raise UserError(
                f"{cache} was made for another model: its {what} is {here}, "
                f"the teacher wants {wanted}; pass the model it was made for, or encode anew"
            )
    views, factor = identity.preprocessing.views, 2 if identity.posterior else 1
    for layout in manifest.layouts:
        for name, wanted_shape in wanted_shapes(layout, unet, views, factor).items():
            found = _describe(layout.field(name))
            if found != wanted_shape:
                raise UserError(
                    f"{cache}: its {name} are {found}, the teacher wants {wanted_shape}; "
                    "pass the model it was made for, or encode anew"
                )
    check_shards(manifest, cache)


def wanted_shapes(
    layout: Layout, unet: Mapping[str, Any], views: int, factor: int
) -> dict[str, str]:
    """Say what each field of a layout must look like for this UNet; free sizes are its own."""
    text = layout.field("prompt_embeds")
    assert text is not None  # every layout has it
    captions, length = text.shape[:2]
    height, width = layout.latent_size
    channels = factor * unet["in_channels"]
    wanted = {
        "latents": f"<f2 ({views}, {channels}, {height}, {width})",
        "prompt_embeds": f"<f2 ({captions}, {length}, {unet['cross_attention_dim']})",
        "pooled_prompt_embeds": "missing",
        "time_ids": "missing",
    }
    if unet.get("addition_embed_type") == "text_time":
        embedded = TIME_IDS * unet["addition_time_embed_dim"]
        pooled = unet["projection_class_embeddings_input_dim"] - embedded
        wanted["pooled_prompt_embeds"] = f"<f2 ({captions}, {pooled})"
        wanted["time_ids"] = f"<i4 ({views}, {TIME_IDS})"
    return wanted


def _describe(field: Field | None) -> str:
    return "missing" if field is None else f"{field.dtype} {field.shape}"


def check_shards(manifest: Manifest, cache: Any) -> None:
    """Raise UserError where a shard cannot hold as many samples as its row says."""
    for shard in manifest.shards:
        expected = shard.layout.shard_bytes(shard.count)
        if shard.size != expected:
            raise UserError(
                f"{cache}/{shard.file}: {shard.count} samples of its layout take {expected} "
                f"bytes, the manifest says {shard.size}: the manifest is damaged; run `prep finish`"
            )
