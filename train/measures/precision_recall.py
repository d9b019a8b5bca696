"""Precision and recall of drawn pictures (Kynkäänniemi et al., 2019)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]  # [N, D], features of a picture each

NEIGHBOURS = 3  # k, as published
PORTION = 2**22  # distances computed at once


def precision_recall(real: Rows, drawn: Rows) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which drawn pictures lie among the real ones, and which real ones among the drawn.

    `real` and `drawn` are features `[N, D]` and `[M, D]`; `[M]` and `[N]` are returned. Their means
    are precision and recall. A picture lies among others where it is in the ball around one of
    them that reaches to its third nearest neighbour (equations 1 and 2).
    """
    return among(drawn, real), among(real, drawn)


def among(points: Rows, others: Rows) -> NDArray[np.bool_]:
    """Which of `[M, D]` lie in a ball of `others` `[N, D]`."""
    reach = radii(others)
    return np.concatenate([
        (squared_distances(part, others) <= reach).any(1) for part in portions(points, len(others))
    ])  # fmt: skip


def radii(rows: Rows) -> NDArray[np.float64]:
    """The squared distance `[N]` of each row to its third nearest neighbour, itself aside."""
    nearest = min(NEIGHBOURS, len(rows) - 1)
    found, start = [], 0
    for part in portions(rows, len(rows)):
        distances = squared_distances(part, rows)
        own = np.arange(len(part))
        distances[own, start + own] = np.inf
        found.append(np.partition(distances, nearest - 1, axis=1)[:, nearest - 1])
        start += len(part)
    return np.concatenate(found)


def squared_distances(a: Rows, b: Rows) -> NDArray[np.float64]:
    """`[N, M]` between `[N, D]` and `[M, D]`."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.asarray(squares.clip(min=0))


def portions(rows: Rows, others: int) -> list[Rows]:
    """A few rows at a time."""
    count = max(1, PORTION // others)
    return [rows[start : start + count] for start in range(0, len(rows), count)]
