"""How the student of a run is drawn: its forward and its scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import guidance_embedding, schedule_from_config
from shared.errors import UserError
from shared.networks.denoiser import Denoiser, call_unet
from shared.networks.sampling import Predict, sampling_time_ids, takes_eta, teacher_predictor
from train.config import DistillConfig
from train.objectives import objective_of


def student_sampler(
    unet: Denoiser, text: TextEmbeds, empty: TextEmbeds | None, guidance_scale: float,
    size: tuple[int, int], scheduler_config: Mapping[str, Any], config: DistillConfig,
) -> tuple[Predict, Any]:  # fmt: skip
    """How the student of a run with this `config` is drawn: its forward and its scheduler.

    Where its guidance is not learned, it takes classifier-free guidance, and that needs `empty`.
    """
    sampler = objective_of(config).sampler
    scheduler = sampler.build(scheduler_config, config)
    if not sampler.classifier_free:
        return student_predictor(unet, text, guidance_scale, size), scheduler
    assert empty is not None
    return teacher_predictor(unet, text, empty, guidance_scale, size), scheduler


def most_steps(config: DistillConfig, scheduler_config: Mapping[str, Any]) -> int:
    """The largest number of steps that the student of a run with this `config` can be drawn in."""
    most = objective_of(config).sampler.most_steps
    return most(config) if most else schedule_from_config(scheduler_config).num_train_timesteps


def check_eta(eta: float, config: DistillConfig) -> None:
    """Raise UserError where the student of a run with this `config` is drawn without eta."""
    scheduler = objective_of(config).sampler.scheduler
    if eta and not takes_eta(scheduler):
        raise UserError(
            f"--eta {eta:g} means nothing to {scheduler.__name__}, which draws students of "
            f"--objective {config.objective}; leave it out"
        )


def student_predictor(
    unet: Denoiser, text: TextEmbeds, guidance_scale: float, size: tuple[int, int]
) -> Predict:
    """One forward per step; a full student is told the guidance, a LoRA student has it built in."""
    dim = unet.config.time_cond_proj_dim
    time_ids = sampling_time_ids(text, size)
    embedding = None
    if dim is not None:
        w = torch.full((len(text),), guidance_scale - 1.0, device=text.prompt_embeds.device)
        embedding = guidance_embedding(w, dim)
    return lambda z, t: call_unet(unet, z, t, text, time_ids, embedding)
