"""Trajectory targets: from z at t_{n+k}, student and target predict z at an earlier s.

Where s lies is all that `pcm` and `tcd` differ in: it is what a `Landing` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import TCDScheduler
from torch import Tensor

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import Schedule, add_noise, expand, solver_timesteps
from train.config import DistillConfig
from train.data.batch import Batch
from train.flag_groups import FullStudentFlags, SolverFlags, TeacherFlags, names_of
from train.objectives.formulas import check_solver, distance, guided_step, trajectory_function
from train.objectives.lcd import Networks
from train.objectives.objective import Card, Loss, Objective, Sampler, teacher_outputs

COMFY = (
    "CFG 1, in ComfyUI sampler `euler` with scheduler `simple`, whose timesteps are "
    "diffusers' to within one solver step"
)


class Landing(Protocol):
    """Where the student shall land."""

    @property
    def uniforms(self) -> int:
        """How many numbers in [0, 1) it wants of each sample."""

    def __call__(self, start: Tensor, end: Tensor, batch: Batch) -> Tensor:
        """Timesteps s `[B]` for solver steps from `start` to `end`, each `[B]`."""


@dataclass(frozen=True)
class Trajectory(Loss):
    """The loss with its settings. `schedule` lies on the batch's device, in fp32.

    s = 0 is the schedule's first timestep, where abar is not quite 1: TCDScheduler's last step
    lands there, too, whatever `set_alpha_to_one` says.
    """

    schedule: Schedule
    num_ddim_timesteps: int
    loss_type: str
    huber_c: float
    landing: Landing
    grid: int | None = None  # timesteps that the teacher was asked at, where they are more

    @property
    def intervals(self) -> int:
        """`batch.index` is the solver interval, or one of the finer grid."""
        return self.grid or self.num_ddim_timesteps

    @property
    def uniforms(self) -> int:
        """As many as the landing wants."""
        return self.landing.uniforms

    def __call__(self, batch: Batch, empty: TextEmbeds, networks: Networks) -> Tensor:
        """d(f(z, t_{n+k} -> s), f_target(z_hat, t_n -> s)) of a batch, a scalar."""
        schedule = self.schedule
        start, end = solver_timesteps(  # t_{n+k} and t_n
            batch.index, self.num_ddim_timesteps, schedule.num_train_timesteps, self.grid
        )
        s = self.landing(start, end, batch)
        end = torch.maximum(end, s)  # a step that begins on a finer grid would go too far
        z = add_noise(batch.latents, batch.noise, *schedule.alpha_sigma(start))
        predicted = trajectory_function(networks.student(z, start, batch), z, start, s, schedule)
        with torch.no_grad():
            said = teacher_outputs(networks, z, start, batch, empty)
            z_hat = guided_step(said, z, start, end, batch.w, schedule)
            output = networks.target(z_hat, end, batch)
            target = trajectory_function(output, z_hat, end, s, schedule)
            # Where the solver has arrived, its z is the target, without the target's roundings.
            target = torch.where(expand(end == s, z), z_hat, target)
        return distance(predicted, target, self.loss_type, self.huber_c)


def trajectory(
    landing: Callable[[DistillConfig, Schedule], Landing],
    flags: tuple[str, ...],
    learning_rates: dict[str, float],
    purpose: str,
    tag: str,
) -> Objective:
    """The objective whose targets lie where `landing` says; `flags` are those that it reads.

    `landing` may raise UserError.
    """

    def build(config: DistillConfig, schedule: Schedule, grid: int | None = None) -> Trajectory:
        check_solver(config, schedule, grid)
        return Trajectory(
            schedule=schedule,
            num_ddim_timesteps=config.num_ddim_timesteps,
            loss_type=config.loss_type,
            huber_c=config.huber_c,
            landing=landing(config, schedule),
            grid=grid,
        )

    return Objective(
        build=build,
        flags=(*names_of(SolverFlags, FullStudentFlags, TeacherFlags), *flags),
        learning_rates=learning_rates,
        needs_teacher=True,
        needs_target=True,
        takes_guidance=True,
        sampler=Sampler(
            scheduler=TCDScheduler,
            options=lambda config: {"original_inference_steps": config.num_ddim_timesteps},
            classifier_free=False,
            steps=4,
            preview_steps=(1, 2, 4, 8),
            most_steps=lambda config: config.num_ddim_timesteps,
        ),
        card=Card(
            purpose=purpose,
            settings=(
                "w_min", "w_max", "num_ddim_timesteps", *flags, "loss_type", "lora_rank",
                "lora_alpha", "ema_decay", *names_of(TeacherFlags),
            ),
            tags=(tag,),
            other_programs=lambda config: COMFY,
            drawing="It is drawn without noise between the steps. `eta`, from 0 to 1, adds some: "
            "pass it to the pipeline, or `--eta` to `train sample`.",
        ),
    )  # fmt: skip
