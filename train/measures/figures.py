"""Figures with 95% intervals by the bootstrap: how far they would move with other pictures.

Captions are drawn again with replacement (Efron, 1979), and with each caption all that belongs to
it: what was drawn for it, its real picture, the teacher's. The same captions are drawn again for
every figure and every row, so the same evaluation always has the same intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.measures.sharpness import share
from train.measures.space import Rows, Space

Interval = tuple[float, float]
Draw = NDArray[np.int64]  # [N], the captions that are drawn again

SEED = 0
RESAMPLES = 1000  # of what is quickly computed
OUTSIDE = (0.025, 0.975)
Z = 1.959964  # standard deviations within which 95% of a normal distribution lie


@dataclass(frozen=True)
class Figure:
    """A number of the table, and where it would lie 95 times of 100 with other captions."""

    value: float
    interval: Interval
    bias: float | None = None  # by which the value is likely above the true one


def draws(count: int, times: int) -> NDArray[np.int64]:
    """Numbers `[times, count]` below `count`, the same at every call."""
    return np.random.default_rng(SEED).integers(count, size=(times, count))


def of_mean(values: NDArray[np.float64]) -> Figure:
    """The mean of `[N]`."""
    return of_statistic(lambda draw: float(values[draw].mean()), len(values))


def of_sharpness(energies: NDArray[np.float64], reference: NDArray[np.float64]) -> Figure:
    """The share of high frequencies relative to a reference's; energies are `[N, 2]`."""
    return of_statistic(lambda draw: share(energies[draw]) / share(reference[draw]), len(energies))


def of_statistic(statistic: Callable[[Draw], float], count: int) -> Figure:
    """What `statistic` makes of all captions; the middle 95% of what it makes of those drawn again.

    It is given the numbers of captions, `[count]`.
    """
    found = [statistic(draw) for draw in draws(count, RESAMPLES)]
    low, high = np.quantile(found, OUTSIDE)
    return Figure(statistic(np.arange(count)), (float(low), float(high)))


def of_distance(space: Space, real: Rows, drawn: Rows) -> Figure:
    """The distance between features `[N, D]` of real and drawn pictures, row i of both caption i's.

    Chance moves both sides apart. So a distance lies above the true one, and one of pictures that
    are drawn again lies above the one of those that they were drawn from, by about as much: the
    bias (Efron and Tibshirani, 1993, chapter 10). All rows of a table have it, so value and
    interval keep it: the interval is 1.96 standard deviations to each side of the value. The value
    less the bias estimates the distance from endlessly many pictures, and the interval less the
    bias says where that lies.
    """
    value = space.distance(real, drawn)
    times = space.distances.resamples(*drawn.shape)
    again = space.distances.resampled(real, drawn, draws(len(drawn), times))
    spread = Z * float(again.std(ddof=1))
    interval = (max(0.0, value - spread), value + spread)
    return Figure(value, interval, float(again.mean()) - value)
