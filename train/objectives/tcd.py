"""Trajectory consistency distillation (arXiv 2402.19159): the target is anywhere before t_n.

With `--target-steps` it is where schedules of so many steps go (arXiv 2409.01347).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.diffusion import Schedule, schedule_targets
from shared.errors import UserError
from train.config import DistillConfig
from train.data.batch import Batch
from train.flag_groups import TargetFlags, names_of
from train.objectives.trajectory import trajectory


@dataclass(frozen=True)
class RandomTime:
    """One of `times` `[S]`, ascending from 0, that are not after t_n; all are equally likely."""

    times: Tensor
    uniforms: int = 1

    def __call__(self, start: Tensor, end: Tensor, batch: Batch) -> Tensor:
        """Timesteps `[B]`."""
        assert batch.uniforms is not None
        count = torch.searchsorted(self.times, end, right=True)
        chosen = (batch.uniforms[:, 0] * count).long()
        return self.times[torch.minimum(chosen, count - 1)]  # which rounding may have reached


def landing(config: DistillConfig, schedule: Schedule) -> RandomTime:
    """The targets that the flags ask for. Raises UserError for a schedule the solver has not."""
    total, steps = schedule.num_train_timesteps, config.num_ddim_timesteps
    for wanted in config.target_steps:
        if wanted > steps:
            raise UserError(
                f"--target-steps {wanted} must be 1 to {steps}, the solver's --num-ddim-timesteps"
            )
    times = torch.arange(total)
    if config.target_steps:
        times = torch.cat([schedule_targets(n, steps, total) for n in config.target_steps]).unique()
    return RandomTime(times.to(schedule.alphas_cumprod.device))


OBJECTIVE = trajectory(
    landing,
    flags=names_of(TargetFlags),
    learning_rates={"lora": 1e-4, "full": 8e-6},
    purpose="that lets {teacher} draw in 1 to 8 steps: [trajectory consistency distillation]"
    "(https://arxiv.org/abs/2402.19159)",
    tag="trajectory-consistency",
)
