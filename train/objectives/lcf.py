"""Latent consistency fine-tuning (arXiv 2310.04378, section 4.4): from data alone, no teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import Schedule, add_noise, solver_timesteps
from train.config import DistillConfig
from train.data.batch import Batch
from train.flag_groups import ConsistencyFlags, FullStudentFlags, SolverFlags, names_of
from train.objectives import lcd
from train.objectives.formulas import check_solver, consistency_function, distance
from train.objectives.objective import Card, Loss, Objective


class Networks(Protocol):
    """Two networks; outputs are eps or v as the teacher predicted, fp32."""

    def student(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """With gradients, told the guidance `batch.w` where it takes it."""

    def target(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The student's slower or frozen self, without gradients."""


@dataclass(frozen=True)
class LCF(Loss):
    """The loss with its settings. `schedule` lies on the batch's device, in fp32."""

    schedule: Schedule
    num_ddim_timesteps: int
    timestep_scaling: float
    loss_type: str
    huber_c: float

    @property
    def intervals(self) -> int:
        """`batch.index` is the interval."""
        return self.num_ddim_timesteps

    def __call__(self, batch: Batch, empty: TextEmbeds, networks: Networks) -> Tensor:
        """d(f(z_{t_{n+k}}, t_{n+k}), f_target(z_{t_n}, t_n)) of a batch, a scalar.

        Both z are the same picture under the same noise: no solver goes from one to the other.
        """
        start, end = solver_timesteps(  # t_{n+k} and t_n
            batch.index, self.num_ddim_timesteps, self.schedule.num_train_timesteps
        )
        z = add_noise(batch.latents, batch.noise, *self.schedule.alpha_sigma(start))
        predicted = self.f(networks.student(z, start, batch), z, start)
        with torch.no_grad():
            z_prev = add_noise(batch.latents, batch.noise, *self.schedule.alpha_sigma(end))
            target = self.f(networks.target(z_prev, end, batch), z_prev, end)
        return distance(predicted, target, self.loss_type, self.huber_c)

    def f(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The consistency function (eq. 9) of a network's output at (z, t)."""
        return consistency_function(output, z, t, self.schedule, self.timestep_scaling)


def build(config: DistillConfig, schedule: Schedule, grid: int | None = None) -> LCF:
    """The loss that the flags ask for; it has no teacher, and so no `grid` of its answers.

    Raises UserError for intervals that do not divide T.
    """
    assert grid is None
    check_solver(config, schedule)
    return LCF(
        schedule=schedule,
        num_ddim_timesteps=config.num_ddim_timesteps,
        timestep_scaling=config.timestep_scaling_factor,
        loss_type=config.loss_type,
        huber_c=config.huber_c,
    )


OBJECTIVE = Objective(
    build=build,
    flags=names_of(SolverFlags, ConsistencyFlags, FullStudentFlags),
    learning_rates={"lora": 1e-4, "full": 8e-6},
    needs_teacher=False,
    needs_target=True,
    takes_guidance=True,
    sampler=lcd.OBJECTIVE.sampler,
    card=Card(
        purpose="of {teacher} that draws in 1 to 8 steps, fine-tuned by [latent consistency "
        "fine-tuning](https://arxiv.org/abs/2310.04378)",
        settings=(
            "num_ddim_timesteps", "loss_type", "lora_rank", "lora_alpha", "ema_decay",
        ),
        tags=("latent-consistency",),
        other_programs=lcd.comfy_settings,
    ),
)  # fmt: skip
