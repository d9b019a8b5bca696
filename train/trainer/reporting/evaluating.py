"""Evaluation during training: held-out captions, drawn by the student as it stands and measured.

Each process draws its share of the captions. What is measured on their pictures is put together, so
that the figures are those of one process. Noise comes from generators of its own, so a run that is
evaluated trains as one that is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from shared.cache.manifest import Manifest, open_manifest
from shared.errors import UserError
from shared.models.family import SCHEDULER_CONFIG, Model, load_config
from shared.models.vae import decode_latents, load_vae
from shared.networks.cache_checks import check_fit, check_vae
from shared.networks.denoiser import Denoiser
from shared.storage.urls import Place
from shared.wording import counted, duration
from train.config import RunConfig
from train.evaluation.artist import Artist
from train.evaluation.evaluate import TRIED, most_at_once
from train.evaluation.heldout import HeldOut, open_heldout, read_heldout
from train.evaluation.score import decode_all
from train.measures.scorers import Scorer, open_scorer
from train.measures.space import Pictures, Rows, Space, digits, open_space
from train.networks.student import Student
from train.objectives import objective_of
from train.sampling.preview import ready_to_draw
from train.trainer.distributed import Distributed
from train.trainer.reporting.log_lines import EVALUATIONS, steps_in

Asked = Callable[[], bool]  # shall the run end? Entered by all processes
SEED = 0  # of the noise, as `train evaluate` has it unless told: the same for every run


@dataclass(frozen=True)
class Figures:
    """What an evaluation has found: a line of evaluations.jsonl."""

    step: int
    samples: int  # that training steps have consumed
    drawing_steps: int
    num_samples: int
    features: str
    fd: float
    accuracy: float | None  # null without a scorer
    seconds: float

    def tracked(self) -> dict[str, float]:
        """What trackers get."""
        return {"fd": self.fd} | ({} if self.accuracy is None else {"accuracy": self.accuracy})


@dataclass
class Evaluations:
    """The captions and real pictures by which a student is measured while it is trained."""

    artist: Artist
    distributed: Distributed
    heldout: HeldOut  # this process's share
    num_samples: int  # of all processes together
    space: Space
    scorer: Scorer | None
    width: int  # of the features
    noted: set[int]  # steps, of those from here on, whose figures are in evaluations.jsonl
    real: Rows | None = field(default=None, repr=False)  # features of all real pictures

    @property
    def drawing_steps(self) -> int:
        """In how many steps a picture is drawn: as the run's students are unless told."""
        return objective_of(self.artist.config).sampler.usual_steps(self.artist.config)

    def measure(self, unet: Denoiser, step: int, samples: int, asked: Asked) -> Figures | None:
        """Draw all captions with `unet`, as it is after `step`, and measure the pictures.

        All processes enter it. None where the run was asked to end meanwhile.
        """
        began = time.perf_counter()
        if self.real is None:
            self.real = self._rows_of(lambda part: self.heldout.latents[part], None, asked)
        if self.real is None:
            return None
        artist = replace(self.artist, student=unet)
        rows = self._rows_of(lambda part: self._draw(artist, part), self.scorer, asked)
        if rows is None:
            return None
        return Figures(
            step=step,
            samples=samples,
            drawing_steps=self.drawing_steps,
            num_samples=self.num_samples,
            features=self.artist.config.features,
            fd=self.space.distance(self.real, rows[:, : self.width]),
            accuracy=None if self.scorer is None else float(rows[:, self.width].mean()),
            seconds=time.perf_counter() - began,
        )

    def told(self, found: Figures) -> str:
        """What is said of an evaluation, in a line."""
        title = self.space.title
        score = "" if self.scorer is None else f", {self.scorer.title} {found.accuracy:.3f}"
        return (
            f"step {found.step}: {title} {found.fd:{digits(title)}}{score} "
            f"({found.num_samples:,} held-out captions in {counted(found.drawing_steps, 'step')}, "
            f"{duration(found.seconds)})"
        )

    def _draw(self, artist: Artist, part: slice) -> Tensor:
        first = SEED + self._share().start
        numbers = range(first, first + len(self.heldout))[part]
        with ready_to_draw(artist.student, artist.device):
            return artist.draw("student", self.drawing_steps, self.heldout.texts[part], numbers)

    def _rows_of(
        self, latents_of: Callable[[slice], Tensor], scorer: Scorer | None, asked: Asked
    ) -> Rows | None:
        """Features of all pictures, and their scores behind, `[num_samples, D or D + 1]`.

        A few pictures are in memory at a time. None where the run shall end.
        """
        found, size = [], most_at_once(self.heldout.shape)
        for start in range(0, len(self.heldout), size):
            if asked():
                return None
            part = slice(start, start + size)
            images = decode_all(self.artist, latents_of(part))
            found.append(measured(images, self.heldout.captions[part], self.space, scorer))
        mine = torch.from_numpy(np.concatenate(found))
        rows = np.empty((self.num_samples, mine.shape[1]))
        for rank, theirs in enumerate(self.distributed.collect(mine)):
            share = self._share(rank)
            rows[share.start : share.stop] = theirs.numpy()
        return rows

    def _share(self, rank: int | None = None) -> range:
        rank = self.distributed.rank if rank is None else rank
        return share_of(self.num_samples, rank, self.distributed.world)


def measured(
    images: Pictures, captions: tuple[str, ...], space: Space, scorer: Scorer | None
) -> Rows:
    """Features of pictures `[N, H, W, 3]` and, with a scorer, their scores behind: `[N, D + 1]`."""
    features = space.features(images)
    if scorer is None:
        return features
    return np.concatenate([features, scorer(images, captions)[:, None]], axis=1)


def share_of(count: int, rank: int, world: int) -> range:
    """Which of `count` captions a process draws: as many as each other, for FSDP's forwards.

    So the last ones overlap where the count is no multiple of the world.
    """
    each = -(-count // world)
    first = min(rank * each, count - each)
    return range(first, first + each)


def open_evaluations(
    config: RunConfig, model: Model, student: Student, distributed: Distributed, done: int,
    vae: AutoencoderKL | None,
) -> Evaluations | None:  # fmt: skip
    """What --evaluation-steps asks for, tried on two pictures; `done` steps are behind.

    `vae` is the previews', where there are any. Raises UserError for held-out samples, a VAE, a
    feature space or a scorer that cannot be had.
    """
    if not config.evaluation_steps:
        return None
    space = open_space(config.features, distributed.device)
    scorer = open_scorer(config.scorer, distributed.device)
    cache, manifest = open_eval_cache(config)
    check_fit(manifest, model, cache)
    source = config.vae or model.source
    vae = vae or load_vae(source).to(distributed.device)
    check_vae(manifest, vae, cache, source)
    heldout = read_share(cache, manifest, config.num_eval_samples, space, distributed)
    few = slice(0, TRIED)
    images = decode_latents(vae, heldout.latents[few] / vae.config.scaling_factor)
    tried = measured(images, heldout.captions[few], space, scorer)
    return Evaluations(
        artist=Artist(
            model=model,
            config=config,
            scheduler_config=load_config(model.source, SCHEDULER_CONFIG),
            student=student.drawing(),
            vae=vae,
            vae_source=source,
            device=distributed.device,
            guidance_scale=model.family.guidance_scale,
            empty=heldout.empty.to(distributed.device),
            shape=heldout.shape,
        ),
        distributed=distributed,
        heldout=heldout,
        num_samples=config.num_eval_samples,
        space=space,
        scorer=scorer,
        width=tried.shape[1] - (scorer is not None),
        noted=noted_by_main(config.run, done, distributed),
    )


def open_eval_cache(config: RunConfig) -> tuple[Place, Manifest]:
    """The cache of the held-out samples. Raises UserError where none are held out of the run's."""
    cache = config.eval_cache or config.cache
    manifest = open_manifest(cache)
    if config.eval_cache is None and not manifest.heldout:
        raise UserError(
            f"--evaluation-steps: {cache} has no samples held out of training; pass --eval-cache a "
            "cache of other pictures, or, before the run begins, hold some out: python -m prep "
            f"finish --cache {cache} --holdout 1000"
        )
    return cache, manifest


def read_share(
    cache: Place, manifest: Manifest, count: int, space: Space, distributed: Distributed
) -> HeldOut:
    """This process's share of the first `count` samples of the cache's largest bucket.

    As `train evaluate` has them. Raises UserError where there are fewer, or too few for a distance.
    """
    if count < space.least:
        raise UserError(
            f"--num-eval-samples {count}: a distance in {space.name} features needs {space.least}"
        )
    bucket = open_heldout(cache, manifest)
    there = len(bucket)
    if there < count:
        fewer = "" if there < space.least else f"{there}, or "
        raise UserError(
            f"--num-eval-samples {count}: {cache} has {counted(there, 'sample')} of its most "
            f"frequent size to evaluate on; give {fewer}an --eval-cache with more"
        )
    share = share_of(count, distributed.rank, distributed.world)
    return read_heldout(cache, manifest, bucket, share)


def noted_by_main(run: Path, done: int, distributed: Distributed) -> set[int]:
    """Step `done`, if its figures are noted already by what the main process reads, for all."""
    here = torch.tensor([done in steps_in(run / EVALUATIONS)], dtype=torch.int64)
    return {done} if distributed.collect(here)[0] else set()
