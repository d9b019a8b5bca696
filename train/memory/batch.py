"""A batch without numbers: what goes into a step on torch's meta device, which has shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shared.cache.conditioning import TextEmbeds
from train.data.batch import Batch
from train.objectives.objective import Loss

META = torch.device("meta")
TOKENS = 77


def meta_batch(
    unet_config: Mapping[str, Any],
    latent_size: tuple[int, int],
    count: int,
    loss: Loss,
    answered: bool = False,
) -> Batch:
    """A batch of `count` samples for a loss, in the dtypes in which the loader puts it together.

    `unet_config` is the teacher's; where `answered` is true, its answers are read from the cache.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, *shape, dtype=dtype, device=META)

    latents = (unet_config["in_channels"], *latent_size)
    text, time_ids = meta_conditioning(unet_config, count, torch.float16)
    return Batch(
        latents=empty(*latents),
        prompt_embeds=text.prompt_embeds,
        pooled_prompt_embeds=text.pooled_prompt_embeds,
        time_ids=time_ids,
        noise=empty(*latents),
        index=empty(dtype=torch.int64),
        w=empty(),
        answers=empty(2, *latents) if answered else None,
        uniforms=empty(loss.uniforms) if loss.uniforms else None,
        noises=empty(loss.noises, *latents) if loss.noises else None,
    )


def meta_conditioning(
    unet_config: Mapping[str, Any], count: int, dtype: torch.dtype
) -> tuple[TextEmbeds, Tensor | None]:
    """Embeddings of `count` captions and, for SDXL, their `time_ids` `[count, 6]`."""

    def empty(width: int, *before: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(count, *before, width, dtype=dtype, device=META)

    pooled = time_ids = None
    if unet_config.get("addition_embed_type") == "text_time":
        sinusoids = 6 * unet_config["addition_time_embed_dim"]
        pooled = empty(unet_config["projection_class_embeddings_input_dim"] - sinusoids)
        time_ids = empty(6, dtype=torch.int32)
    return TextEmbeds(empty(unet_config["cross_attention_dim"], TOKENS), pooled), time_ids
