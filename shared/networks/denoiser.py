"""The network that predicts noise or velocity: loaded from a model, and called."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import Schedule, schedule_from_config
from shared.errors import UserError
from shared.models.family import SCHEDULER_CONFIG, load_config
from shared.models.single_file import is_single_file, load_part
from shared.models.weights import load_whole
from shared.networks.precision import no_autocast

Denoiser: TypeAlias = UNet2DConditionModel  # the only architecture so far


def load_unet(source: str, dtype: torch.dtype = torch.float32) -> Denoiser:
    """A model's UNet, frozen, channels last. Raises UserError where there is none."""
    if is_single_file(source):
        unet = load_part(UNet2DConditionModel, source, "unet", dtype)
    else:
        unet = load_whole(
            UNet2DConditionModel.from_pretrained, source, "UNet",
            subfolder="unet", torch_dtype=dtype, use_safetensors=True,
        )  # fmt: skip
    return unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def load_schedule(source: str) -> Schedule:
    """A model's noise schedule. Raises UserError for one that distillation does not know."""
    try:
        return schedule_from_config(load_config(source, SCHEDULER_CONFIG))
    except (ValueError, TypeError, RuntimeError) as error:  # numbers that are none, or too many
        raise UserError(f"{source}: {error}") from None


def call_unet(
    unet: nn.Module,
    z: Tensor,
    t: Tensor,
    text: TextEmbeds,
    time_ids: Tensor | None,
    guidance: Tensor | None = None,
) -> Tensor:
    """The UNet's output `[B, C, h, w]` in the dtype of `z`, which is fp32 outside of tests.

    `guidance` is the embedding `[B, time_cond_proj_dim]`, for students that take one. time_ids
    take z's dtype too: bf16 would turn 1023 into 1024.
    """
    assert z.dtype in (torch.float32, torch.float64)
    added: dict[str, Any] | None = None
    if text.pooled_prompt_embeds is not None:
        assert time_ids is not None
        pooled = text.pooled_prompt_embeds.to(z.dtype)
        added = {"text_embeds": pooled, "time_ids": time_ids.to(z.dtype)}
    output: Tensor = unet(
        z, t, text.prompt_embeds.to(z.dtype), timestep_cond=guidance, added_cond_kwargs=added
    ).sample
    return output.to(z.dtype)


def cond_and_uncond(
    unet: Denoiser,
    z: Tensor,
    t: Tensor,
    text: TextEmbeds,
    empty: TextEmbeds,
    time_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional output in one batched forward; `empty` has one row."""
    with no_autocast(z.device):  # which cannot join fp16 on a CPU
        both = TextEmbeds.cat([text, empty.expand(len(z))])
    ids = None if time_ids is None else torch.cat([time_ids, time_ids])
    cond, uncond = call_unet(unet, torch.cat([z, z]), torch.cat([t, t]), both, ids).chunk(2)
    return cond, uncond
