"""Where the frames lie between the ends, and how evenly the picture changes along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from train.evaluation.features import features

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


def respaced(drawn: Mapping[float, Pixels], frames: int) -> list[float]:
    """`frames` places with the same way between neighbours, by what has been drawn so far.

    The way to a place is the sum of the steps up to it; in between it grows in a straight line
    (DiffMorpher, section 4.4).
    """
    places = sorted(drawn)
    way = np.concatenate([[0], distances([drawn[a] for a in places]).cumsum()])
    if way[-1] == 0:
        return evenly(frames)
    wanted = np.linspace(0, way[-1], frames)
    found = np.interp(wanted, way, places)
    return [0.0, *(float(a) for a in found[1:-1]), 1.0]


def evenest(drawn: Mapping[float, Pixels], frames: int) -> list[float]:
    """Of all places drawn, the `frames` from end to end whose steps' squares add up to least.

    Of ways of one length the even one has the least; and a frame that strays costs more. Dynamic
    programming over the pairs: `least[j]` is the best way to place j in so many steps.
    """
    places = sorted(drawn)
    found = features(np.stack([drawn[a] for a in places]))
    squares = np.square(found[:, None] - found[None]).sum(2)
    squares[np.tril_indices(len(places))] = np.inf  # never back, nor on the spot
    least, before = squares[0], list[NDArray[np.intp]]()
    for _ in range(frames - 2):
        sums = least[:, None] + squares
        before.append(sums.argmin(0))
        least = sums.min(0)
    chosen = [len(places) - 1]
    for best in reversed(before):
        chosen.append(int(best[chosen[-1]]))
    return [places[number] for number in (0, *reversed(chosen))]
