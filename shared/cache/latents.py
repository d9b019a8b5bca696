"""Raw latents, as a cache stores them, become x0."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GRAIN = 16_384  # elements at a time: above 32,767 torch wakes a pool of threads of its own


def finish_latents(
    raw: NDArray[np.float16], noise: NDArray[np.float32] | None, scaling_factor: float, into: Tensor
) -> None:
    """Make x0 `[C, h, w]` of the stored mean, or mean and logvar: sampled and scaled in fp32."""
    values: NDArray[np.float16] | NDArray[np.float32] = raw
    if noise is not None:
        mean, logvar = np.split(raw.astype(np.float32), 2)
        values = mean + np.exp(0.5 * logvar) * noise
    parts = torch.split(torch.from_numpy(values).flatten(), GRAIN)
    for x0, part in zip(torch.split(into.flatten(), GRAIN), parts, strict=True):
        x0.copy_(part).mul_(scaling_factor)
