"""The ordinary diffusion loss, for fine-tuning on one's own pictures (docs/finetuning.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import Schedule, add_noise, diffusion_target
from train.config import DistillConfig
from train.data.batch import Batch
from train.flag_groups import DiffusionLossFlags, names_of
from train.objectives.objective import Card, Loss, Objective, Sampler


class Networks(Protocol):
    """The only network there is; its output is eps or v, fp32."""

    def student(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """With gradients."""


@dataclass(frozen=True)
class Denoise(Loss):
    """The loss with its settings. `schedule` lies on the batch's device, in fp32."""

    schedule: Schedule
    snr_gamma: float | None

    @property
    def intervals(self) -> int:
        """`batch.index` is the timestep itself, uniform over all of them."""
        return self.schedule.num_train_timesteps

    def __call__(self, batch: Batch, empty: TextEmbeds, networks: Networks) -> Tensor:
        """Mean squared error of the predicted noise or velocity, a scalar."""
        t = batch.index
        alpha, sigma = self.schedule.alpha_sigma(t)
        output = networks.student(add_noise(batch.latents, batch.noise, alpha, sigma), t, batch)
        wanted = diffusion_target(
            batch.latents, batch.noise, alpha, sigma, self.schedule.prediction_type
        )
        errors = ((output - wanted) ** 2).flatten(1).mean(1)
        return (self.weights(t) * errors).mean()

    def weights(self, t: Tensor) -> Tensor:
        """Min-SNR weights `[B]` (arXiv 2303.09556, section 3.4); ones without a gamma.

        min(snr, gamma) / snr for eps; / (snr + 1) for v, which snr = 0 does not trouble.
        """
        if self.snr_gamma is None:
            return torch.ones_like(t, dtype=self.schedule.alphas_cumprod.dtype)
        abar = self.schedule.alphas_cumprod[t]
        snr = abar / (1 - abar)
        whole = snr + 1 if self.schedule.prediction_type == "v_prediction" else snr
        return snr.clamp(max=self.snr_gamma) / whole


def build(config: DistillConfig, schedule: Schedule, grid: int | None = None) -> Denoise:
    """The loss that the flags ask for; it has no teacher, and so no `grid` of its answers."""
    assert grid is None
    return Denoise(schedule, config.snr_gamma)


OBJECTIVE = Objective(
    build=build,
    flags=names_of(DiffusionLossFlags),
    learning_rates={"lora": 1e-4, "full": 1e-5},
    needs_teacher=False,
    needs_target=False,
    takes_guidance=False,
    sampler=Sampler(
        scheduler=DDIMScheduler,
        options=lambda config: {"timestep_spacing": "trailing"},
        classifier_free=True,
        steps=50,
        preview_steps=(25,),
    ),
    card=Card(
        purpose="that fine-tunes {teacher} with the ordinary diffusion loss",
        settings=("lora_rank", "lora_alpha", *names_of(DiffusionLossFlags)),
    ),
)
