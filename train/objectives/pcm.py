"""Phased consistency (PCM, arXiv 2405.18407): the target is the lower edge of the phase."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.diffusion import Schedule, phase_edges
from shared.errors import UserError
from train.config import DistillConfig
from train.data.batch import Batch
from train.flag_groups import PhaseFlags, names_of
from train.objectives.trajectory import trajectory


@dataclass(frozen=True)
class PhaseEdge:
    """The last of the `edges` `[M]`, ascending from 0, that lies below t_{n+k}."""

    edges: Tensor
    uniforms: int = 0

    def __call__(self, start: Tensor, end: Tensor, batch: Batch) -> Tensor:
        """Timesteps `[B]`."""
        below = torch.searchsorted(self.edges, start)  # how many
        return self.edges[(below - 1).clamp(min=0)]


def landing(config: DistillConfig, schedule: Schedule) -> PhaseEdge:
    """The phases that the flags ask for. Raises UserError for more than there are intervals."""
    phases, steps = config.num_phases, config.num_ddim_timesteps
    if phases > steps:
        raise UserError(
            f"--num-phases {phases} must be 1 to {steps}, the solver's --num-ddim-timesteps"
        )
    edges = phase_edges(phases, steps, schedule.num_train_timesteps)
    return PhaseEdge(edges.to(schedule.alphas_cumprod.device))


OBJECTIVE = trajectory(
    landing,
    flags=names_of(PhaseFlags),
    learning_rates={"lora": 5e-6, "full": 5e-6},
    purpose="that lets {teacher} draw in 1 to 8 steps: [phased consistency]"
    "(https://arxiv.org/abs/2405.18407)",
    tag="phased-consistency",
)
