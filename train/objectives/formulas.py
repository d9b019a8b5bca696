"""What several objectives are made of: a solver's step, consistency functions, distances."""

from __future__ import annotations

from torch import Tensor

from shared.diffusion import (
    Schedule,
    boundary_scalings,
    consistency,
    ddim_step,
    guided,
    huber_distance,
    l2_distance,
    nearest_divisor,
    predicted_eps,
    predicted_x0,
)
from shared.errors import UserError
from train.config import DistillConfig


def guided_step(
    teacher: tuple[Tensor, Tensor],
    z: Tensor,
    start: Tensor,
    end: Tensor,
    w: Tensor,
    schedule: Schedule,
) -> Tensor:
    """One DDIM step of the guided teacher from `start` to `end`, each `[B]` (LCM, eq. 13, 14).

    `teacher` is its conditional and unconditional output at z `[B, C, h, w]`.
    """
    cond, uncond = teacher
    at = (z, *schedule.alpha_sigma(start), schedule.prediction_type)
    x0 = guided(predicted_x0(cond, *at), predicted_x0(uncond, *at), w)
    eps = guided(predicted_eps(cond, *at), predicted_eps(uncond, *at), w)
    return ddim_step(x0, eps, *schedule.alpha_sigma(end))


def consistency_function(
    output: Tensor, z: Tensor, t: Tensor, schedule: Schedule, timestep_scaling: float
) -> Tensor:
    """f(z, t) of a network's output at (z, t) (LCM, eq. 9)."""
    x0 = predicted_x0(output, z, *schedule.alpha_sigma(t), schedule.prediction_type)
    return consistency(z, x0, *boundary_scalings(t.to(z.dtype), timestep_scaling))


def trajectory_function(
    output: Tensor, z: Tensor, t: Tensor, s: Tensor, schedule: Schedule
) -> Tensor:
    """f(z, t -> s) = alpha_s x0 + sigma_s eps of a network's output at (z, t).

    TCD, arXiv 2402.19159, and PCM, arXiv 2405.18407, without boundary scalings: f(z, t -> t) is z
    whatever the output.
    """
    at = (z, *schedule.alpha_sigma(t), schedule.prediction_type)
    return ddim_step(
        predicted_x0(output, *at), predicted_eps(output, *at), *schedule.alpha_sigma(s)
    )


def distance(a: Tensor, b: Tensor, loss_type: str, huber_c: float) -> Tensor:
    """The mean distance that --loss-type names, a scalar."""
    return huber_distance(a, b, huber_c) if loss_type == "huber" else l2_distance(a, b)


def check_solver(config: DistillConfig, schedule: Schedule, grid: int | None = None) -> None:
    """Raise UserError for solver intervals that do not divide T.

    Nor may they fail to divide the `grid` of timesteps that the teacher was asked at.
    """
    steps, total = config.num_ddim_timesteps, schedule.num_train_timesteps
    if total % steps:
        raise UserError(
            f"--num-ddim-timesteps {steps} must divide {total}, the timesteps of the teacher "
            f"(num_train_timesteps); the nearest that does is "
            f"{nearest_divisor(steps, total)}"
        )
    if grid is not None and (grid % steps or total % grid):
        raise UserError(
            f"--num-ddim-timesteps {steps} does not divide {grid}, the timesteps of the cache's "
            f"answers (`prep teach --num-ddim-timesteps` or `prep synthesize --steps`); give "
            f"--num-ddim-timesteps {grid} or another that divides it, or add --teacher online"
        )
