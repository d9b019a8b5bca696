"""Latent consistency distillation (arXiv 2310.04378, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import LCMScheduler
from torch import Tensor

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import Schedule, add_noise, solver_timesteps
from train.config import DistillConfig
from train.data.batch import Batch
from train.flag_groups import (
    ConsistencyFlags,
    FullStudentFlags,
    SolverFlags,
    TeacherFlags,
    names_of,
)
from train.objectives.formulas import check_solver, consistency_function, distance, guided_step
from train.objectives.objective import Card, Loss, Objective, Sampler, teacher_outputs

COMFY_SOLVER = (50, 10.0)  # solver steps and timestep scaling of ComfyUI's LCM sampling


class Networks(Protocol):
    """The three networks of distillation; outputs are eps or v as the teacher predicts, fp32."""

    def student(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """With gradients, told the guidance `batch.w` where it takes it."""

    def target(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The student's slower or frozen self, without gradients."""

    def teacher(
        self, z: Tensor, t: Tensor, batch: Batch, empty: TextEmbeds
    ) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional prediction, without gradients."""


@dataclass(frozen=True)
class LCD(Loss):
    """The loss with its settings. `schedule` lies on the batch's device, in fp32."""

    schedule: Schedule
    num_ddim_timesteps: int
    timestep_scaling: float
    loss_type: str
    huber_c: float
    grid: int | None = None  # timesteps that the teacher was asked at, where they are more

    @property
    def intervals(self) -> int:
        """`batch.index` is the solver interval, or one of the finer grid."""
        return self.grid or self.num_ddim_timesteps

    def __call__(self, batch: Batch, empty: TextEmbeds, networks: Networks) -> Tensor:
        """The loss of a batch, a scalar; `empty` is the unconditional embedding, one row.

        Of the six steps that algorithm 1 repeats these are 2 to 4. The loader has done step 1
        (drawn latents, captions, n and w); the training loop does 5 (the gradient step) and 6 (the
        average).
        """
        start, end = solver_timesteps(  # t_{n+k} and t_n
            batch.index, self.num_ddim_timesteps, self.schedule.num_train_timesteps, self.grid
        )
        # 2. Noise the latents to t_{n+k}.
        z = add_noise(batch.latents, batch.noise, *self.schedule.alpha_sigma(start))
        predicted = self.f(networks.student(z, start, batch), z, start)
        with torch.no_grad():
            # 3. From there to t_n by one step of the guided teacher's solver.
            said = teacher_outputs(networks, z, start, batch, empty)
            z_prev = guided_step(said, z, start, end, batch.w, self.schedule)
            target = self.f(networks.target(z_prev, end, batch), z_prev, end)
        # 4. The distance of what the student says at t_{n+k} from what the target says at t_n.
        return distance(predicted, target, self.loss_type, self.huber_c)

    def f(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The consistency function (eq. 9) of a network's output at (z, t)."""
        return consistency_function(output, z, t, self.schedule, self.timestep_scaling)


def build(config: DistillConfig, schedule: Schedule, grid: int | None = None) -> LCD:
    """The loss that the flags ask for. Raises UserError for intervals that do not divide T.

    Nor may they fail to divide the `grid` of timesteps that the teacher was asked at.
    """
    check_solver(config, schedule, grid)
    return LCD(
        schedule=schedule,
        num_ddim_timesteps=config.num_ddim_timesteps,
        timestep_scaling=config.timestep_scaling_factor,
        loss_type=config.loss_type,
        huber_c=config.huber_c,
        grid=grid,
    )


def comfy_settings(config: DistillConfig) -> str:
    """How a student is drawn in ComfyUI and its like, which are told no guidance."""
    text = "CFG 1, sampler LCM, in ComfyUI with scheduler `simple`"
    solver = (config.num_ddim_timesteps, config.timestep_scaling_factor)
    if solver != COMFY_SOLVER:
        text += (
            f" (which takes {COMFY_SOLVER[0]} solver steps and scaling {COMFY_SOLVER[1]:g} for "
            f"granted, where this student has {solver[0]} and {solver[1]:g}: diffusers draws it "
            "as it was trained)"
        )
    return text


OBJECTIVE = Objective(
    build=build,
    flags=names_of(SolverFlags, ConsistencyFlags, FullStudentFlags, TeacherFlags),
    learning_rates={"lora": 1e-4, "full": 8e-6},
    needs_teacher=True,
    needs_target=True,
    takes_guidance=True,
    sampler=Sampler(
        scheduler=LCMScheduler,
        options=lambda config: {
            "original_inference_steps": config.num_ddim_timesteps,
            "timestep_scaling": config.timestep_scaling_factor,
        },
        classifier_free=False,
        steps=4,
        preview_steps=(1, 2, 4, 8),
        most_steps=lambda config: config.num_ddim_timesteps,
    ),
    card=Card(
        purpose="that lets {teacher} draw in 1 to 8 steps: [latent consistency distillation]"
        "(https://arxiv.org/abs/2310.04378)",
        settings=(
            "w_min", "w_max", "num_ddim_timesteps", "loss_type", "lora_rank", "lora_alpha",
            "ema_decay", *names_of(TeacherFlags),
        ),
        tags=("latent-consistency",),
        other_programs=comfy_settings,
    ),
)  # fmt: skip
