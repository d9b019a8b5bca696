"""Feature spaces by name: pictures become features, and two sets of features have a distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from shared.errors import UserError
from train.measures import shapes
from train.measures.frechet import Frechet
from train.measures.named import load_function, source_hash

Pictures = NDArray[np.uint8]  # [N, H, W, 3], RGB
Rows = NDArray[np.float64]  # [N, D], features of a picture each

CPU = torch.device("cpu")
LEAST = 65  # pictures; fewer tell nothing of a covariance
READY = (shapes.SHAPES,)


class Distance(Protocol):
    """How far two sets of features are from each other."""

    def __call__(self, a: Rows, b: Rows) -> float:
        """Between `[N, D]` and `[M, D]`."""

    def resampled(self, a: Rows, b: Rows, draws: NDArray[np.int64]) -> NDArray[np.float64]:
        """The distances `[B]` of the rows `draws` `[B, N]`, the same ones of both sets."""

    def resamples(self, count: int, width: int) -> int:
        """How often to draw again from `count` rows of `width` features, at a bearable cost."""

    def few_pictures(self, count: int, width: int) -> str | None:
        """What to know of a distance from `count` pictures, where they are few."""


@dataclass(frozen=True)
class Space:
    """Features of pictures, and the distance that goes with them."""

    name: str  # a ready name, or MODULE:FUNCTION
    title: str  # of the distance, over its column
    words: str  # the same for a note below a table
    embed: Callable[[Pictures], Rows]
    distances: Distance
    source: str | None = None  # where the weights are from, as it was typed
    weights: str | None = None  # a fingerprint of them; of a function its file's
    least: int = LEAST  # pictures without which there is no distance

    def features(self, images: Pictures) -> Rows:
        """Features `[N, D]` of pictures. Raises UserError where a function gives something else."""
        rows = np.asarray(self.embed(images), dtype=np.float64)
        if rows.ndim != 2 or len(rows) != len(images):
            raise UserError(
                f"--features {self.name}: {len(images)} pictures gave an array of shape "
                f"{list(rows.shape)}; features are [N, D], a row for each picture"
            )
        if not np.isfinite(rows).all():
            raise UserError(f"--features {self.name}: not all features are finite numbers")
        return rows

    def distance(self, a: Rows, b: Rows) -> float:
        """Between two sets of features, `[N, D]` and `[M, D]`."""
        return self.distances(a, b)


def open_space(name: str = shapes.SHAPES, device: torch.device = CPU) -> Space:
    """Open a feature space: `shapes`, or MODULE:FUNCTION from pictures to `[N, D]`.

    Networks run on `device`. Raises UserError, with what is known, where there is none.
    """
    if name == shapes.SHAPES:
        words = "Fréchet distance in shapes features"
        return Space(name, "FD", words, shapes.features, Frechet())
    function = load_function("--features", name, READY)
    words = f"Fréchet distance in {name} features"
    return Space(name, "FD", words, function, Frechet(), weights=source_hash(function))
