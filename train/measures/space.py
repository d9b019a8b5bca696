"""Feature spaces by name: pictures become features, and two sets of features have a distance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from shared.errors import UserError
from shared.models.fingerprint import fingerprint
from train.measures import shapes
from train.measures.frechet import Frechet
from train.measures.mmd import MMD
from train.measures.named import load_function, numbers, source_hash
from train.measures.weights import weights_folder

Pictures = NDArray[np.uint8]  # [N, H, W, 3], RGB
Rows = NDArray[np.float64]  # [N, D], features of a picture each

CPU = torch.device("cpu")
LEAST = 65  # pictures; a covariance of fewer tells nothing
FRECHET = "Fréchet distance"


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
    embed: Callable[[Pictures], Rows]
    distances: Distance
    source: str | None = None  # where the weights are from: a hub id, a folder, a file
    weights: str | None = None  # a fingerprint of them; of a function its file's
    least: int = LEAST  # pictures without which there is no distance

    def features(self, images: Pictures) -> Rows:
        """Features `[N, D]` of pictures. Raises UserError where a function gives something else."""
        rows = numbers(f"--features {self.name}", self.embed(images))
        if rows.ndim != 2 or len(rows) != len(images) or not rows.shape[1]:
            raise UserError(
                f"--features {self.name}: {len(images)} pictures gave an array of shape "
                f"{list(rows.shape)}; features are [N, D], a row for each picture"
            )
        if not np.isfinite(rows).all():
            raise UserError(f"--features {self.name}: not all features are finite numbers")
        return rows

    def distance(self, a: Rows, b: Rows) -> float:
        """Between two sets of features, `[N, D]` and `[M, D]`. Raises UserError for two D."""
        if a.shape[1] != b.shape[1]:
            raise UserError(
                f"--features {self.name}: {a.shape[1]} features of some pictures and {b.shape[1]} "
                "of others; each picture needs as many"
            )
        return self.distances(a, b)


@dataclass(frozen=True)
class Learned:
    """A space that a network gives, as it was published."""

    title: str
    weights: str  # a hub id
    width: int  # features
    distances: Distance
    plain: str  # the title with a network of another width, which nobody has published
    least: int = LEAST


INCEPTION, DINOV2, CLIP = "inception", "dinov2", "clip"
LEARNED: Mapping[str, Learned] = {
    INCEPTION: Learned("FID", "torch-fidelity", 2048, Frechet(), "FD"),
    DINOV2: Learned("FD-DINOv2", "facebook/dinov2-large", 1024, Frechet(), "FD"),
    CLIP: Learned("CMMD", "openai/clip-vit-large-patch14-336", 768, MMD(), "MMD", least=2),
}
READY = (shapes.SHAPES, *LEARNED)


def open_space(name: str = shapes.SHAPES, device: torch.device = CPU) -> Space:
    """Open a feature space: a name of READY, NAME:WEIGHTS, or MODULE:FUNCTION.

    WEIGHTS is a folder or a hub id (of inception a file); FUNCTION makes features `[N, D]` of
    pictures. Networks run on `device`. Raises UserError, with what is known, where there is none.
    """
    ready, _, source = name.partition(":")
    if ready == shapes.SHAPES:
        if source:
            raise UserError(f"--features {name}: {ready} has no weights; leave {source} out")
        return Space(ready, "FD", shapes.features, Frechet())
    if ready in READY:
        return learned_space(ready, source or LEARNED[ready].weights, device)
    function = load_function("--features", name, READY)
    return Space(name, "FD", function, Frechet(), weights=source_hash(function))


def learned_space(name: str, source: str, device: torch.device) -> Space:
    """A space whose features a network gives. Raises UserError where its weights are not here."""
    published = LEARNED[name]
    encoder = open_encoder(name, source, device)
    return Space(
        name=name,
        title=published.title if encoder.width == published.width else published.plain,
        embed=encoder,
        distances=published.distances,
        source=source,
        weights=fingerprint(encoder.network),
        least=published.least,
    )


def open_encoder(name: str, source: str, device: torch.device) -> Any:
    """The network of a ready space, called with pictures. Raises UserError where it is not here."""
    published = LEARNED[name].weights
    if name == INCEPTION:
        from train.measures.inception import Inception

        return Inception(None if source == published else source, device)
    folder = weights_folder(f"--features {name}", source, published)
    from train.measures import networks  # slow to import, so only now

    kind = networks.Dinov2 if name == DINOV2 else networks.ClipImages
    return kind(folder, device)


def distance_title(name: str) -> str:
    """What the distance in a space of this name is called, with the published weights."""
    published = LEARNED.get(name.partition(":")[0])
    return "FD" if published is None else published.title


def meaning(title: str) -> str:
    """What a distance of this title is."""
    squared = "1000 times the squared maximum mean discrepancy"
    return squared if title.endswith("MMD") else FRECHET


def digits(title: str) -> str:
    """How a distance of this title is written."""
    return ".3f" if title.endswith("MMD") else ".1f"
