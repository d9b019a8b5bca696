"""What a set of drawn pictures is measured against, and the row of the table it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.cli.progress import Progress
from shared.models.vae import decode_latents
from train.config import EvaluateConfig
from train.evaluation.artist import Artist
from train.evaluation.features import Gaussian, features, frechet_distance, high_frequency_share
from train.evaluation.heldout import HeldOut

Scorer = Callable[[NDArray[np.uint8], Sequence[str]], NDArray[np.float64]]


@dataclass(frozen=True)
class Result:
    """A line of the table. Null where a figure does not apply."""

    sampler: str
    steps: int
    fd: float
    accuracy: float | None
    latent_mse: float | None  # 1 step only, against the teacher's 50 steps from the same noise
    high_frequency: float  # relative to the teacher's 50 steps
    ms_per_image: float = 0.0  # sampling alone, without the VAE's decoding
    timestep_spacing: str | None = None


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


def draw_all(
    artist: Artist, row: tuple[str, int], heldout: HeldOut, config: EvaluateConfig, bar: Progress,
    first: int = 0,
) -> Tensor:  # fmt: skip
    """Latents for held-out captions from `first` on; sample i starts from the noise of seed + i."""
    parts = [torch.empty(0, *artist.shape)]
    for start in range(first, len(heldout), config.batch_size):
        texts = heldout.texts[slice(start, start + config.batch_size)]
        seeds = range(config.seed + start, config.seed + start + len(texts))
        parts.append(artist.draw(*row, texts, seeds))
        bar.update(len(texts) * row[1], f"{row[0]} {row[1]}")
    return torch.cat(parts)


def decode_all(artist: Artist, latents: Tensor) -> NDArray[np.uint8]:
    """Scaled latents to pixels."""
    return decode_latents(artist.vae, latents / artist.vae.config.scaling_factor)
