"""Drawing with teacher and student through diffusers' own schedulers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import SCHEDULE, guidance_embedding, schedule_from_config
from train.networks.teacher import call_unet, twice
from train.objectives import OBJECTIVES

Predict = Callable[[Tensor, Tensor], Tensor]  # (z [B, C, h, w], t [B]) -> output [B, C, h, w]


def teacher_scheduler(sampler: str, spacing: str, config: dict[str, Any]) -> Any:
    """A solver for the teacher: `ddim` or `dpmsolver++` (second order, multistep).

    `spacing` is diffusers' timestep_spacing: trailing, leading or linspace.
    """
    if sampler == "ddim":
        return DDIMScheduler.from_config(config, timestep_spacing=spacing)
    return DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing=spacing
    )


def student_drawing(
    unet: UNet2DConditionModel, text: TextEmbeds, empty: TextEmbeds | None, guidance_scale: float,
    size: tuple[int, int], scheduler_config: dict[str, Any], config: dict[str, Any],
) -> tuple[Predict, Any]:  # fmt: skip
    """How the student of a run with this `config` is drawn: its forward and its scheduler.

    In few steps by LCMScheduler; or, where it was trained as its teacher was, by DDIM with
    classifier-free guidance, for which it needs `empty`.
    """
    if OBJECTIVES[config["objective"]].few_steps:
        predict = student_predictor(unet, text, guidance_scale, size)
        return predict, student_scheduler(scheduler_config, config)
    assert empty is not None
    predict = teacher_predictor(unet, text, empty, guidance_scale, size)
    return predict, teacher_scheduler("ddim", "trailing", scheduler_config)


def most_steps(config: dict[str, Any], scheduler_config: dict[str, Any]) -> int:
    """The largest number of steps that the student of a run with this `config` can be drawn in."""
    if OBJECTIVES[config["objective"]].few_steps:
        return int(config["num_ddim_timesteps"])
    return schedule_from_config(scheduler_config).num_train_timesteps


def student_scheduler(config: dict[str, Any], distilled: dict[str, Any]) -> LCMScheduler:
    """diffusers' LCMScheduler with the numbers the student was distilled with.

    What `config` leaves open is said: LCMScheduler's own defaults are others than in training.
    """
    return LCMScheduler.from_config(
        {**SCHEDULE, **config},
        original_inference_steps=distilled["num_ddim_timesteps"],
        timestep_scaling=distilled["timestep_scaling_factor"],
    )


def student_predictor(
    unet: UNet2DConditionModel, text: TextEmbeds, guidance_scale: float, size: tuple[int, int]
) -> Predict:
    """One forward per step; a full student is told the guidance, a LoRA student has it built in."""
    dim = unet.config.time_cond_proj_dim
    time_ids = sampling_time_ids(text, size)
    embedding = None
    if dim is not None:
        w = torch.full((len(text),), guidance_scale - 1.0, device=text.prompt_embeds.device)
        embedding = guidance_embedding(w, dim)
    return lambda z, t: call_unet(unet, z, t, text, time_ids, embedding)


def teacher_predictor(
    unet: UNet2DConditionModel,
    text: TextEmbeds,
    empty: TextEmbeds,
    guidance_scale: float,
    size: tuple[int, int],
) -> Predict:
    """Classifier-free guidance: uncond + guidance_scale (cond - uncond), in one batched forward."""
    time_ids = sampling_time_ids(text, size)

    def predict(z: Tensor, t: Tensor) -> Tensor:
        if guidance_scale == 1.0:
            return call_unet(unet, z, t, text, time_ids)
        cond, uncond = twice(unet, z, t, text, empty, time_ids)
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
) -> Tensor:
    """Scaled latents `[N, C, h, w]`, one per seed, in fp32.

    Each sample has a CPU generator of its own, so it does not depend on the batch it is drawn in,
    and is what a diffusers pipeline draws from `torch.Generator().manual_seed(seed)`.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scheduler.set_timesteps(steps, device=device)
    z = randn_tensor((len(seeds), *shape), generator=generators, device=device)
    z = z * scheduler.init_noise_sigma
    noisy = {"generator": generators} if isinstance(scheduler, LCMScheduler) else {}
    for t in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(z, t), t.expand(len(seeds)))
        z = scheduler.step(output, t, z, **noisy).prev_sample
    return z
