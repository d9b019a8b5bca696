"""Sums over latents, from which the cache's statistics are folded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ChannelSums:
    """Float64 sums over the latents' mean, per channel: what mean and std are folded from."""

    count: int
    total: tuple[float, ...]
    squares: tuple[float, ...]

    @staticmethod
    def of(latents: NDArray[np.float16]) -> ChannelSums:
        """Return sums over `[..., C, h, w]`."""
        values = latents.astype(np.float64).reshape(-1, *latents.shape[-3:])
        return ChannelSums(
            values[:, 0].size,
            tuple(map(float, values.sum((0, 2, 3)))),
            tuple(map(float, (values**2).sum((0, 2, 3)))),
        )

    def __add__(self, other: ChannelSums) -> ChannelSums:
        return ChannelSums(
            self.count + other.count,
            tuple(a + b for a, b in zip(self.total, other.total, strict=True)),
            tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
        )

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Return per-channel mean and standard deviation."""
        mean = np.asarray(self.total) / self.count
        variance = np.asarray(self.squares) / self.count - mean**2
        return mean.tolist(), np.sqrt(np.maximum(variance, 0)).tolist()
