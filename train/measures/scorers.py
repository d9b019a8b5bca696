"""Scorers by name: how well each picture fits its caption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError
from shared.models.fingerprint import fingerprint
from train.measures.named import load_function, numbers
from train.measures.space import CPU, Pictures
from train.measures.weights import processor_folder, weights_folder


@dataclass(frozen=True)
class Learned:
    """A scorer that a network of CLIP's kind gives, as it was published."""

    title: str
    weights: str  # a hub id
    processor: str  # of the tokenizer and the settings for pictures
    finish: Callable[[Tensor, Tensor], Tensor]  # of cosines and the network's temperature


CLIP, PICKSCORE = "clip-score", "pickscore"
LEARNED: Mapping[str, Learned] = {
    CLIP: Learned(
        title="CLIP score",
        weights="openai/clip-vit-large-patch14",
        processor="openai/clip-vit-large-patch14",
        finish=lambda cosines, _: 100 * cosines.clamp(min=0),
    ),
    PICKSCORE: Learned(
        title="PickScore",
        weights="yuvalkirstain/PickScore_v1",
        processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        finish=lambda cosines, temperature: temperature * cosines,
    ),
}
READY = tuple(LEARNED)
ACCURACY = "accuracy"  # the title of others


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
        scores = numbers(f"--scorer {self.name}", self.score(images, captions))
        if scores.shape != (len(images),):
            raise UserError(
                f"--scorer {self.name}: {len(images)} pictures gave an array of shape "
                f"{list(scores.shape)}; a score for each picture is wanted"
            )
        if not np.isfinite(scores).all():
            raise UserError(f"--scorer {self.name}: not all scores are finite numbers")
        return scores


def open_scorer(name: str | None, device: torch.device = CPU) -> Scorer | None:
    """Open a scorer: a name of READY, NAME:WEIGHTS, or MODULE:FUNCTION; None for None.

    WEIGHTS is a folder or a hub id; FUNCTION makes scores `[N]` of pictures and captions. Networks
    run on `device`. Raises UserError, with what is known, where there is none.
    """
    if name is None:
        return None
    ready, _, source = name.partition(":")
    if ready in READY:
        return learned_scorer(ready, source or None, device)
    return Scorer(name, ACCURACY, load_function("--scorer", name, READY))


def learned_scorer(name: str, source: str | None, device: torch.device) -> Scorer:
    """A scorer of CLIP's kind. Raises UserError where its files are not here.

    A `source` of one's own has the processor's files, too.
    """
    published, asked = LEARNED[name], f"--scorer {name}"
    folder = weights_folder(asked, source or published.weights, published.weights)
    processor = processor_folder(asked, source or published.processor, published.processor)
    from train.measures.networks import ClipScores  # slow to import, so only now

    scores = ClipScores(folder, processor, device, published.finish)
    used = source or published.weights
    return Scorer(name, published.title, scores, used, fingerprint(scores.network))
