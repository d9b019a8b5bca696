"""Are drawn pictures copies? Each is compared with every training sample, in latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.cache.manifest import open_manifest
from shared.cli.progress import Progress
from shared.errors import UserError
from shared.wording import counted
from train.config import EvaluateConfig
from train.data.bucket import Bucket, open_buckets
from train.evaluation.artist import Artist
from train.evaluation.heldout import HeldOut, caption_of
from train.evaluation.score import decode_all
from train.sampling.pictures import write_grid
from train.state.run_paths import recorded_cache

BLOCK = 2**24  # latent values read at once: 32 MB as fp16
SUSPECT = 0.01  # of the held-out pictures lie nearer than what is called near


@dataclass(frozen=True)
class Nearest:
    """How far drawn and held-out pictures lie from the training samples nearest to them.

    Distances are the root mean square difference of latent values, medians over the pictures.
    """

    steps: int  # in which the student drew
    searched: int  # training samples of the same size
    drawn: float
    heldout: float
    ratio: float | None  # of the two; None where held-out pictures are training samples
    near: int  # drawn pictures that lie nearer than 99 of 100 held-out ones


@dataclass(frozen=True)
class Training:
    """The samples that a run was trained on, of one latent size."""

    bucket: Bucket
    channels: int
    scale: float  # of the VAE

    def __len__(self) -> int:
        return len(self.bucket)

    def latents(self, numbers: Sequence[int]) -> Tensor:
        """The scaled means of samples' posteriors, `[n, views, C, h, w]` in fp32."""
        field = self.bucket.layout.field("latents")
        assert field is not None
        found = np.empty((len(numbers), *field.shape), np.float16)
        spans = [
            span
            for values, number in zip(found, numbers, strict=True)
            for view in range(field.shape[0])
            for span in self.bucket.spans(
                number, (("latents", view),), [values[view].data.cast("B")]
            )
        ]
        self.bucket.finish(self.bucket.start(spans))
        return torch.from_numpy(found[:, :, : self.channels].astype(np.float32)) * self.scale

    def blocks(self) -> Iterator[range]:
        """The numbers of all samples, a few at a time."""
        field = self.bucket.layout.field("latents")
        assert field is not None
        count = max(1, BLOCK // int(np.prod(field.shape)))
        for start in range(0, len(self), count):
            yield range(start, min(start + count, len(self)))


def open_training(config: EvaluateConfig, artist: Artist, heldout: HeldOut) -> Training:
    """The run's training samples of the held-out pictures' size, without those that are held out.

    Raises UserError where there are none, or the cache is not here.
    """
    cache = config.cache or recorded_cache(artist.config.cache, "--cache")
    manifest = open_manifest(cache)
    artist.check_cache(manifest, cache)
    for bucket in open_buckets(cache, manifest, max_samples=artist.config.max_train_samples):
        if bucket.layout.latent_size == heldout.shape[1:]:
            vae = manifest.identity.vae
            return Training(bucket, vae.channels, vae.scaling_factor)
    height, width = heldout.shape[1:]
    raise UserError(
        f"--nearest-samples: {cache} has no training samples of the pictures' size, latents of "
        f"{height} x {width}; leave the flag out"
    )


@torch.inference_mode()
def nearest_samples(
    latents: Tensor, training: Training, device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """For latents `[N, C, h, w]` the sample and the view nearest to each, and how far they are.

    |a - b|^2 = |a|^2 + |b|^2 - 2 a b finds them, a block of samples at a time; the distance itself
    is computed from their difference, which has no cancellation.
    """
    asked = latents.flatten(1).to(device)
    least = torch.full((len(asked),), torch.inf, device=device)
    which = torch.zeros(len(asked), dtype=torch.long, device=device)
    views = 1
    with Progress("nearest samples", len(training), "sample") as progress:
        for numbers in training.blocks():
            block = training.latents(numbers)
            views = block.shape[1]
            block = block.flatten(0, 1).flatten(1).to(device)
            squares = (block**2).sum(1) - 2 * asked @ block.T  # less |a|^2, which all have
            best, index = squares.min(1)
            nearer = best < least
            least = torch.where(nearer, best, least)
            which = torch.where(nearer, numbers.start * views + index, which)
            progress.update(len(numbers))
    found = which.cpu().numpy()
    samples, view = found // views, found % views
    gaps = [
        (training.latents([int(number)])[0, int(turn)] - one).square().mean().sqrt()
        for number, turn, one in zip(samples, view, latents, strict=True)
    ]
    return samples, view, np.array([float(gap) for gap in gaps])


def check_copies(
    folder: Path,
    count: int,
    drawn: Tensor,
    steps: int,
    heldout: HeldOut,
    training: Training,
    artist: Artist,
) -> Nearest:
    """Search the training samples for what was drawn in `steps`, `[N, C, h, w]`, and held out.

    The `count` drawn pictures nearest to a training sample are shown beside it in
    evaluation-nearest.png.
    """
    asked = torch.cat([drawn, heldout.latents])
    samples, views, gaps = nearest_samples(asked, training, artist.device)
    mine, others = gaps[: len(drawn)], gaps[len(drawn) :]
    shown = np.argsort(mine, kind="stable")[:count]
    beside = torch.cat([training.latents([int(samples[i])])[:, int(views[i])] for i in shown])
    pairs = zip(
        decode_all(artist, drawn[torch.from_numpy(shown)]), decode_all(artist, beside), strict=True
    )
    labels = [f"{mine[i]:.3f} {caption_of(training.bucket, int(samples[i]))}" for i in shown]
    titles = [f"drawn\n{counted(steps, 'step')}", "nearest training\nsample"]
    write_grid(sheet_in(folder), [list(pair) for pair in pairs], titles, labels)
    middle = float(np.median(others))
    return Nearest(
        steps=steps,
        searched=len(training),
        drawn=float(np.median(mine)),
        heldout=middle,
        ratio=float(np.median(mine)) / middle if middle > 0 else None,
        near=int((mine < np.quantile(others, SUSPECT)).sum()),
    )


def sheet_in(folder: Path) -> Path:
    """Where the pictures are shown."""
    return folder / "evaluation-nearest.png"


def told(nearest: Nearest, num_samples: int) -> str:
    """What was found, in words."""
    start = (
        f"Nearest of {counted(nearest.searched, 'training sample')}, student's {nearest.steps} "
        f"steps: drawn pictures lie {nearest.drawn:.3f} from theirs (median; root mean square per "
        f"latent value), held-out pictures {nearest.heldout:.3f}"
    )
    if nearest.ratio is None:
        return f"{start}: these are training samples themselves, so nothing can be told."
    return (
        f"{start}: {nearest.ratio:.2f} times as far. {nearest.near:,} of {num_samples:,} drawn "
        "pictures lie nearer than 99 of 100 held-out ones."
    )
