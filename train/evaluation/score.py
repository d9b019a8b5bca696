"""What is drawn, what it is measured against, and the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.cli.progress import Progress
from shared.models.vae import decode_latents
from train.evaluation.artist import Artist
from train.evaluation.features import Gaussian, features, frechet_distance, high_frequency_share
from train.evaluation.heldout import HeldOut

Sampling = tuple[str, int]  # a sampler's name and a number of steps
Scorer = Callable[[NDArray[np.uint8], Sequence[str]], NDArray[np.float64]]


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
class Judge:
    """Everything a drawn set of latents is measured against."""

    real: Gaussian
    captions: tuple[str, ...]
    scorer: Scorer | None
    solution: Tensor  # the teacher's 50-step latents
    sharpness: float  # their high-frequency share

    def measure(self, sampler: str, steps: int, latents: Tensor, artist: Artist) -> Result:
        """Measure latents `[N, C, h, w]`."""
        images = decode_all(artist, latents)
        scores = self.scorer(images, self.captions) if self.scorer else None
        return Result(
            sampler=sampler,
            steps=steps,
            fd=frechet_distance(self.real, Gaussian.of(features(images))),
            accuracy=None if scores is None else float(np.mean(scores)),
            latent_mse=float(((latents - self.solution) ** 2).mean()) if steps == 1 else None,
            high_frequency=high_frequency_share(images) / self.sharpness,
            timestep_spacing=None if sampler == "student" else artist.spacing(sampler, steps),
        )


def decode_all(artist: Artist, latents: Tensor) -> NDArray[np.uint8]:
    """Scaled latents to pixels."""
    return decode_latents(artist.vae, latents / artist.vae.config.scaling_factor)
