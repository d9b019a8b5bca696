"""Points of the trajectory on which a teacher drew a sample, as the noise that leads to them.

An answer that was kept while drawing has its z_t beside it. Training makes z_t of x0 and noise; so
the noise is derived from both, and an objective need not know where z_t comes from.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from shared.cache.answers import AnswersIdentity
from shared.diffusion import schedule_from_config, solver_timesteps


def alphas_sigmas(answers: AnswersIdentity) -> NDArray[np.float32]:
    """Return alpha_t and sigma_t `[N, 2]` at t_{n+k} of each solver interval, as training has them.

    Raises ValueError for a schedule that is not known.
    """
    schedule, steps = schedule_from_config(answers.schedule), answers.num_ddim_timesteps
    t, _ = solver_timesteps(torch.arange(steps), steps, schedule.num_train_timesteps)
    return torch.stack(schedule.alpha_sigma(t), dim=1).numpy()


def derive_noise(
    z: NDArray[np.floating],
    x0: NDArray[np.float32],
    alpha_sigma: NDArray[np.float32],
    into: NDArray[np.float32],
) -> None:
    """Fill `into` `[C, h, w]` with (z_t - alpha_t x0) / sigma_t, of which add_noise makes z_t."""
    alpha, sigma = alpha_sigma
    np.multiply(x0, -alpha, out=into)
    into += z
    into /= sigma
