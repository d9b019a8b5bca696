"""The maximum mean discrepancy between two sets of features, as CMMD has it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]  # [N, D], features of a picture each

SIGMA = 10.0
SCALE = 1000.0  # so that it can be read
PORTION = 1024  # rows whose kernels are computed at once
RESAMPLES = 100


class MMD:
    """The distance of CMMD, of two sets of features and of what is drawn again from both.

    1000 times the biased estimate of the squared MMD with the kernel exp(-|x - y|^2 / (2 sigma^2)),
    sigma = 10 (Jayasumana et al., 2024, with features of unit length; Gretton et al., 2012,
    equation 5). Nothing is fitted, so its bias is that of a mean: about 1/N.
    """

    def __call__(self, a: Rows, b: Rows) -> float:
        """Between `[N, D]` and `[M, D]`."""
        of_a, of_b = np.full(len(a), 1 / len(a)), np.full(len(b), 1 / len(b))
        return float(discrepancy(a, b, of_a[None], of_b[None])[0])

    def resampled(self, a: Rows, b: Rows, draws: NDArray[np.int64]) -> NDArray[np.float64]:
        """The distances `[B]` of the rows `draws` `[B, N]`, the same ones of both sets."""
        shares = np.stack([np.bincount(draw, minlength=len(a)) / len(draw) for draw in draws])
        return discrepancy(a, b, shares, shares)

    def resamples(self, count: int, width: int) -> int:
        """How often to draw again: the kernels are computed once."""
        return RESAMPLES

    def few_pictures(self, count: int, width: int) -> str | None:
        """Nothing: a mean of few is not biased as a covariance is; its interval tells of chance."""
        return None


def discrepancy(
    a: Rows, b: Rows, shares_a: NDArray[np.float64], shares_b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """1000 MMD^2 `[B]` of rows weighed by each line of `shares_a` `[B, N]` and `shares_b` `[B, M]`.

    mean k(a, a') + mean k(b, b') - 2 mean k(a, b).
    """
    within = mean_kernel(a, a, shares_a, shares_a) + mean_kernel(b, b, shares_b, shares_b)
    return SCALE * (within - 2 * mean_kernel(a, b, shares_a, shares_b))


def mean_kernel(
    x: Rows, y: Rows, shares_x: NDArray[np.float64], shares_y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The weighted means `[B]` of the kernel over all pairs, a portion of x at a time.

    Of 1 - k, which loses no digits: for sigma 10 and features of unit length k is nearly 1.
    """
    found = np.zeros(len(shares_x))
    for start in range(0, len(x), PORTION):
        part = slice(start, start + PORTION)
        squares = (x[part] ** 2).sum(1)[:, None] + (y**2).sum(1) - 2 * x[part] @ y.T
        kernel = np.expm1(-squares.clip(min=0) / (2 * SIGMA**2))
        found += ((shares_x[:, part] @ kernel) * shares_y).sum(1)
    return found
