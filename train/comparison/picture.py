"""One column for each teacher and each run: the same captions, the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shared.cache.manifest import Manifest, open_manifest
from shared.cli.progress import Progress
from shared.errors import UserError
from shared.models.family import SCHEDULER_CONFIG, load_config
from shared.storage.urls import Place, place
from shared.wording import counted
from train.comparison.summary import Summary
from train.comparison.table import teacher_title, with_teachers
from train.config import CompareConfig, EvaluateConfig, SampleConfig
from train.evaluation.artist import Artist, open_artist
from train.evaluation.evaluate import pictures_at_once
from train.evaluation.heldout import HeldOut, load_heldout
from train.evaluation.score import Sampling, Task, decode_all
from train.evaluation.teacher_results import REFERENCE
from train.objectives import objective_of
from train.sampling.samplers import most_steps
from train.state.run_paths import folders_typed_in, path_from_here, recorded_cache

Pictures = NDArray[np.uint8]  # [N, H, W, 3]


@dataclass(frozen=True)
class Canvas:
    """What all columns have in common: the cache, its first captions, the noise."""

    cache: Place
    manifest: Manifest
    heldout: HeldOut
    seed: int


def open_canvas(config: CompareConfig, summaries: Sequence[Summary]) -> Canvas:
    """Read the captions of the picture: the evaluations' first ones.

    Raises UserError where their cache is not here, or holds other samples by now.
    """
    first = summaries[0]
    cache = config.eval_cache or evaluated_on(first)
    manifest = open_manifest(cache)
    heldout = load_heldout(cache, manifest, first.evaluation.num_samples, least=1)
    if heldout.digest() != first.evaluation.heldout:
        raise UserError(
            f"{cache} holds other samples than {first.run} was evaluated on; name the right one "
            "with --eval-cache, evaluate anew, or leave the picture out with --num-captions 0"
        )
    seed = first.evaluation.seed if config.seed is None else config.seed
    return Canvas(cache, manifest, heldout.first(config.num_captions), seed)


def evaluated_on(summary: Summary) -> Place:
    """Where the cache of a run's evaluation is, seen from here."""
    text = path_from_here(
        summary.evaluation.eval_cache, folders_typed_in(summary.config.run, summary.run)
    )
    return recorded_cache(place(text), "--eval-cache")


def draw_columns(
    config: CompareConfig, summaries: Sequence[Summary], canvas: Canvas
) -> dict[str, Pictures]:
    """The pictures by title: each teacher's of many steps, then each run's student's.

    One run's networks are in memory at a time. Raises UserError for more steps than a student
    knows, and where a run's model or VAE is not the one that was evaluated.
    """
    samplings = [student_sampling(config, one) for one in summaries]
    first = with_teachers(summaries)
    heldout, teachers, students = canvas.heldout, dict[str, Pictures](), dict[str, Pictures]()
    calls = len(heldout) * (sum(steps for _, steps in samplings) + REFERENCE[1] * len(first))
    with Progress("compare", calls, "step") as progress:
        batch_size = pictures_at_once(EvaluateConfig(), heldout.shape)
        task = Task(heldout, batch_size, canvas.seed, progress)
        for summary, sampling in zip(summaries, samplings, strict=True):
            artist = student_of(config, summary, canvas)
            title = student_title(summary, sampling)
            students[title] = decode_all(artist, task.draw(artist, sampling))
            if summary in first:
                artist = with_teacher(artist, summary)
                title = f"{teacher_title(summary, summaries)}\n{counted(REFERENCE[1], 'step')}"
                teachers[title] = decode_all(artist, task.draw(artist, REFERENCE))
            del artist  # before the next is loaded
    return teachers | students


def student_sampling(config: CompareConfig, summary: Summary) -> Sampling:
    """How a run's student is drawn. Raises UserError for more steps than it knows."""
    steps = config.steps or objective_of(summary.config).sampler.usual_steps(summary.config)
    scheduler = load_config(summary.model.source, SCHEDULER_CONFIG)
    most = most_steps(summary.config, scheduler)
    if steps > most:
        raise UserError(
            f"--steps {steps}: the student of {summary.run} knows {most} at most; give fewer, or "
            "leave the flag out"
        )
    return "student", steps


def student_title(summary: Summary, sampling: Sampling) -> str:
    """What stands above a run's column."""
    return f"{summary.name}\n{summary.config.objective}, {counted(sampling[1], 'step')}"


def student_of(config: CompareConfig, summary: Summary, canvas: Canvas) -> Artist:
    """A run's student as it was evaluated. Raises UserError where the cache is not for it."""
    flags = SampleConfig(
        model=config.model, vae=config.vae, threads=config.threads, device=config.device,
        guidance_scale=summary.evaluation.guidance_scale, eta=summary.evaluation.eta,
    )  # fmt: skip
    artist = open_artist(summary.run, flags)
    artist.check_cache(canvas.manifest, canvas.cache)
    empty = canvas.heldout.empty.to(artist.device)
    return replace(artist, empty=empty, shape=canvas.heldout.shape)


def with_teacher(artist: Artist, summary: Summary) -> Artist:
    """The same with its teacher. Raises UserError where it is not the one that was evaluated."""
    assert artist.empty is not None
    artist = artist.with_teacher(artist.empty)
    if artist.teacher_fingerprint() != summary.evaluation.teacher:
        raise UserError(
            f"the teacher of {summary.run}, {artist.model.source}, or its VAE is another than when "
            "it was evaluated; name the right one with --model or --vae, or evaluate anew"
        )
    return artist
