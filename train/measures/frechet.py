"""The Fréchet distance between Gaussians fitted to two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]  # [N, D], features of a picture each
Counts = NDArray[np.int64]  # [N], how often each row is meant

SMALL = 128  # features; the distance is computed in milliseconds
RESAMPLES, FEW_RESAMPLES, FEWEST_RESAMPLES = 100, 50, 20
MIDDLE = 1200  # pictures or features, whichever are fewer; up to here it takes a tenth of a second
PER_FEATURE = 10  # pictures, for a covariance that is more than an impression


@dataclass(frozen=True)
class Gaussian:
    """Mean `[D]` and covariance `[D, D]` of features."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @staticmethod
    def of(rows: Rows) -> Gaussian:
        """Fitted to features `[N, D]`."""
        covariance: NDArray[np.float64] = np.atleast_2d(np.cov(rows, rowvar=False))
        return Gaussian(rows.mean(0), covariance)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) (Dowson and Landau, 1982)."""
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)
    difference = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross).sum()
    return float(difference @ difference + trace)


class Frechet:
    """The distance of two sets of features, and of what is drawn again from both."""

    def __call__(self, a: Rows, b: Rows) -> float:
        """Between Gaussians fitted to `[N, D]` and `[M, D]`."""
        if max(len(a), len(b)) <= a.shape[1]:
            return distance_of_few(a, b)
        return frechet_distance(Gaussian.of(a), Gaussian.of(b))

    def resampled(self, a: Rows, b: Rows, draws: NDArray[np.int64]) -> NDArray[np.float64]:
        """The distances `[B]` of the rows `draws` `[B, N]`, the same ones of both sets."""
        if len(a) <= a.shape[1]:
            counts = [np.bincount(draw, minlength=len(a)) for draw in draws]
            return np.array([distance_of_few(a, b, one) for one in counts])
        return np.array([self(a[draw], b[draw]) for draw in draws])

    def resamples(self, count: int, width: int) -> int:
        """How often to draw again from `count` rows of `width` features, at a bearable cost."""
        work = min(count, width)
        if work <= SMALL:
            return RESAMPLES
        return FEW_RESAMPLES if work <= MIDDLE else FEWEST_RESAMPLES

    def few_pictures(self, count: int, width: int) -> str | None:
        """What to know of a distance from `count` pictures, where they are few."""
        enough = PER_FEATURE * width
        if count >= enough:
            return None
        entries = width * (width + 1) // 2
        return (
            f"Few pictures: {count} for {width} features, whose covariance has "
            f"{entries:,} entries. A Fréchet distance from so few is biased "
            f"upwards and moves with the choice of captions: compare it only between rows of this "
            f"table, and take {enough:,} captions or more{better(enough)} to compare students."
        )


def better(enough: int) -> str:
    """A round number where enough is less."""
    return " (better 1,000)" if enough < 1000 else ""


def distance_of_few(a: Rows, b: Rows, counts: Counts | None = None) -> float:
    """The same distance from fewer rows than features: `[N, D]` and `[M, D]`.

    tr (C_a C_b)^1/2 is the sum of the singular values of A B^T, `[N, M]`, where A and B hold the
    centred rows over the root of N - 1 and M - 1. `counts` says how often each row stands there
    (after drawing again); those that do not stand there make the matrix smaller.
    """
    (mean_a, part_a), (mean_b, part_b) = centred(a, counts), centred(b, counts)
    cross = np.linalg.svd(part_a @ part_b.T, compute_uv=False).sum()
    difference = mean_a - mean_b
    return float(difference @ difference + (part_a**2).sum() + (part_b**2).sum() - 2 * cross)


def centred(rows: Rows, counts: Counts | None) -> tuple[NDArray[np.float64], Rows]:
    """The mean `[D]` and a matrix R for which R^T R is the covariance."""
    counts = np.ones(len(rows), int) if counts is None else counts
    rows, counts = rows[counts > 0], counts[counts > 0]
    mean = counts @ rows / counts.sum()
    return mean, np.sqrt(counts / (counts.sum() - 1))[:, None] * (rows - mean)
