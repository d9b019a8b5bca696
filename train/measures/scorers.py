"""Scorers by name: how well each picture fits its caption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shared.errors import UserError
from train.measures.named import load_function
from train.measures.space import CPU, Pictures

READY: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scorer:
    """A score for each picture and its caption."""

    name: str  # a ready name, or MODULE:FUNCTION
    title: str  # over the column of its means
    score: Callable[[Pictures, Sequence[str]], NDArray[np.float64]]
    source: str | None = None  # where the weights are from, as it was typed
    weights: str | None = None  # a fingerprint of them

    def __call__(self, images: Pictures, captions: Sequence[str]) -> NDArray[np.float64]:
        """Scores `[N]`. Raises UserError where a function gives something else."""
        scores = np.asarray(self.score(images, captions), dtype=np.float64)
        if scores.shape != (len(images),):
            raise UserError(
                f"--scorer {self.name}: {len(images)} pictures gave an array of shape "
                f"{list(scores.shape)}; a score for each picture is wanted"
            )
        if not np.isfinite(scores).all():
            raise UserError(f"--scorer {self.name}: not all scores are finite numbers")
        return scores


def open_scorer(name: str | None, device: torch.device = CPU) -> Scorer | None:
    """Open a scorer: MODULE:FUNCTION from pictures and captions to `[N]`; None for None.

    Networks run on `device`. Raises UserError, with what is known, where there is none.
    """
    if name is None:
        return None
    return Scorer(name, "accuracy", load_function("--scorer", name, READY))
