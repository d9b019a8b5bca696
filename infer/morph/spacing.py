"""Where the frames lie between the ends, and how evenly the picture changes along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from train.measures.shapes import features

NEAR = 1e-6  # a jump that is left between so near places is one

Pixels = NDArray[np.uint8]


def evenly(frames: int) -> list[float]:
    """`frames` numbers from 0 to 1."""
    return [float(a) for a in np.linspace(0, 1, frames)]


def distances(pictures: Sequence[Pixels]) -> NDArray[np.float64]:
    """How much changes from each picture to the next: `[N - 1]`, in `train evaluate`'s features."""
    found = features(np.stack(pictures))
    steps: NDArray[np.float64] = np.linalg.norm(np.diff(found, axis=0), axis=1)
    return steps


def unevenness(pictures: Sequence[Pixels]) -> float:
    """The largest step over the mean one; 1 where all are the same."""
    steps = distances(pictures)
    return float(steps.max() / steps.mean()) if steps.any() else 1.0


def where_most_changes(drawn: Mapping[float, Pixels]) -> float:
    """The middle between the two neighbours that differ most of those that lie apart."""
    places = np.array(sorted(drawn))
    steps = distances([drawn[a] for a in places])
    gaps = np.diff(places)
    steps[gaps < NEAR] = 0
    most = int((steps if steps.any() else gaps).argmax())
    return float(places[most] + places[most + 1]) / 2


def evenest(drawn: Mapping[float, Pixels], frames: int) -> list[float]:
    """Of all places drawn, `frames` with about the same way from each to the next.

    The way to a place is the sum of the steps up to it (DiffMorpher). Each frame is
    the one whose way is nearest to an even share, and none is taken twice.
    """
    places = sorted(drawn)
    way = np.concatenate([[0], distances([drawn[a] for a in places]).cumsum()])
    chosen = [0]
    for left, share in zip(range(frames - 2, 0, -1), way[-1] * inner(frames), strict=True):
        first, last = chosen[-1] + 1, len(places) - 1 - left
        chosen.append(first + int(np.abs(way[first : last + 1] - share).argmin()))
    return [places[number] for number in (*chosen, len(places) - 1)]


def inner(frames: int) -> NDArray[np.float64]:
    """Even shares, without the two ends."""
    shares: NDArray[np.float64] = np.linspace(0, 1, frames)[1:-1]
    return shares
