"""What is drawn, what it is measured against, and the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.cli.progress import Progress
from shared.models.vae import decode_latents
from train.config import EvaluateConfig
from train.evaluation.artist import Artist
from train.evaluation.heldout import HeldOut
from train.measures.figures import Figure, Interval, of_distance, of_mean, of_sharpness
from train.measures.precision_recall import precision_recall
from train.measures.scorers import Scorer, open_scorer
from train.measures.sharpness import energies
from train.measures.space import Pictures, Rows, Space, open_space

Sampling = tuple[str, int]  # a sampler's name and a number of steps


@dataclass(frozen=True)
class Result:
    """What one sampler has achieved: a line of the table. None where a figure does not apply."""

    sampler: str
    steps: int
    fd: float
    accuracy: float | None
    latent_mse: float | None  # 1 step only, against the teacher's 50 steps from the same noise
    high_frequency: float  # relative to the teacher's 50 steps
    ms_per_image: float = 0.0  # sampling alone, without the VAE's decoding
    timestep_spacing: str | None = None
    intervals: Mapping[str, Interval] = field(default_factory=dict)  # 95%, by figure
    precision: float | None = None
    recall: float | None = None
    fd_bias: float | None = None  # by which fd is likely above that of endlessly many pictures


@dataclass(frozen=True)
class Task:
    """What every sampler is to draw: caption i from the noise of seed + i."""

    heldout: HeldOut
    batch_size: int
    seed: int
    progress: Progress

    def first(self, count: int) -> Task:
        """The task of the first `count` captions."""
        return replace(self, heldout=self.heldout.first(count))

    def draw(self, artist: Artist, sampling: Sampling, first: int = 0) -> Tensor:
        """Draw latents `[N, C, h, w]` for the captions from `first` on."""
        sampler, steps = sampling
        parts = [torch.empty(0, *artist.shape)]
        for start in range(first, len(self.heldout), self.batch_size):
            texts = self.heldout.texts[slice(start, start + self.batch_size)]
            seeds = range(self.seed + start, self.seed + start + len(texts))
            parts.append(artist.draw(sampler, steps, texts, seeds))
            self.progress.update(len(texts) * steps, f"{sampler} {steps}")
        return torch.cat(parts)


@dataclass(frozen=True)
class Measures:
    """What pictures are measured by."""

    space: Space
    scorer: Scorer | None = None
    precision_recall: bool = False

    def try_on(self, images: Pictures, captions: Sequence[str]) -> None:
        """Raise UserError, before much is drawn, for a function that gives something else."""
        self.space.features(images)
        if self.scorer is not None:
            self.scorer(images, captions)


def open_measures(config: EvaluateConfig, device: torch.device) -> Measures:
    """Those that the flags name. Raises UserError where a function or weights are not here."""
    return Measures(
        open_space(config.features, device),
        open_scorer(config.scorer, device),
        config.precision_recall,
    )


@dataclass(frozen=True)
class Judge:
    """Everything a drawn set of latents is measured against."""

    measures: Measures
    real: Rows  # features of the held-out pictures, in their order
    captions: tuple[str, ...]
    solution: Tensor  # the teacher's 50-step latents
    energies: NDArray[np.float64]  # of their pictures, [N, 2]; see sharpness.py

    def measure(self, sampler: str, steps: int, latents: Tensor, artist: Artist) -> Result:
        """Measure latents `[N, C, h, w]`."""
        images = decode_all(artist, latents)
        space, scorer = self.measures.space, self.measures.scorer
        features = space.features(images)
        figures = {
            "fd": of_distance(space, self.real, features),
            "high_frequency": of_sharpness(energies(images), self.energies),
        }
        if self.measures.precision_recall:
            within = precision_recall(self.real, features)
            for name, which in zip(("precision", "recall"), within, strict=True):
                figures[name] = of_mean(which.astype(np.float64))
        if scorer is not None:
            figures["accuracy"] = of_mean(scorer(images, self.captions))
        if steps == 1:
            errors = ((latents - self.solution) ** 2).mean((1, 2, 3))
            figures["latent_mse"] = of_mean(errors.numpy().astype(np.float64))
        return result(sampler, steps, figures, artist)


def result(sampler: str, steps: int, figures: Mapping[str, Figure], artist: Artist) -> Result:
    """The line of a sampler with these figures, by their names."""
    values = {name: one.value for name, one in figures.items()}
    return Result(
        sampler=sampler,
        steps=steps,
        fd=values["fd"],
        accuracy=values.get("accuracy"),
        latent_mse=values.get("latent_mse"),
        high_frequency=values["high_frequency"],
        precision=values.get("precision"),
        recall=values.get("recall"),
        timestep_spacing=None if sampler == "student" else artist.spacing(sampler, steps),
        intervals={name: one.interval for name, one in figures.items()},
        fd_bias=figures["fd"].bias,
    )


def decode_all(artist: Artist, latents: Tensor) -> NDArray[np.uint8]:
    """Scaled latents to pixels."""
    return decode_latents(artist.vae, latents / artist.vae.config.scaling_factor)
