"""Drawing latents through diffusers' own schedulers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from shared.cache.conditioning import TextEmbeds
from shared.networks.denoiser import Denoiser, call_unet, cond_and_uncond

Predict = Callable[[Tensor, Tensor], Tensor]  # (z [B, C, h, w], t [B]) -> output [B, C, h, w]
# Is shown z, t, the conditional output, and the unconditional one where it is computed.
Watch = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]


def teacher_scheduler(sampler: str, spacing: str, config: Mapping[str, Any]) -> Any:
    """A solver for the teacher: `ddim` or `dpmsolver++` (second order, multistep).

    `spacing` is diffusers' timestep_spacing: trailing, leading or linspace.
    """
    if sampler == "ddim":
        return DDIMScheduler.from_config(config, timestep_spacing=spacing)
    return DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing=spacing
    )


def teacher_predictor(
    unet: Denoiser,
    text: TextEmbeds,
    empty: TextEmbeds,
    guidance_scale: float,
    size: tuple[int, int],
    watch: Watch | None = None,
) -> Predict:
    """Classifier-free guidance: uncond + guidance_scale (cond - uncond), in one batched forward.

    `watch` sees the outputs of every step, which cost nothing more.
    """
    time_ids = sampling_time_ids(text, size)

    def predict(z: Tensor, t: Tensor) -> Tensor:
        if guidance_scale == 1.0:
            output = call_unet(unet, z, t, text, time_ids)
            if watch is not None:
                watch(z, t, output, None)
            return output
        cond, uncond = cond_and_uncond(unet, z, t, text, empty, time_ids)
        if watch is not None:
            watch(z, t, cond, uncond)
        return uncond + guidance_scale * (cond - uncond)

    return predict


def sampling_time_ids(text: TextEmbeds, size: tuple[int, int]) -> Tensor | None:
    """Micro-conditioning for an uncropped picture of `size` (height, width) in pixels."""
    if text.pooled_prompt_embeds is None:
        return None
    row = torch.tensor([*size, 0, 0, *size], device=text.prompt_embeds.device)
    return row.expand(len(text), 6)


@torch.inference_mode()
def draw_latents(
    predict: Predict,
    scheduler: Any,
    steps: int,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    device: torch.device,
    eta: float = 0.0,
) -> Tensor:
    """Scaled latents `[N, C, h, w]`, one per seed, in fp32.

    Each sample has a CPU generator of its own, so it does not depend on the batch it is drawn in,
    and is what a diffusers pipeline draws from `torch.Generator().manual_seed(seed)`. `eta`, noise
    between the steps, is for schedulers that take it.
    """
    more = {"eta": eta} if takes_eta(scheduler) else {}  # TCD's own default is not the pipelines'
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scheduler.set_timesteps(steps, device=device)
    z: Tensor = randn_tensor((len(seeds), *shape), generator=generators, device=device)
    z = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(z, t), t.expand(len(seeds)))
        z = scheduler.step(output, t, z, generator=generators, **more).prev_sample
    return z


def takes_eta(scheduler: Any) -> bool:
    """Can noise be added between a scheduler's steps? Asked as diffusers' pipelines do."""
    return "eta" in inspect.signature(scheduler.step).parameters
