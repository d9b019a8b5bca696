"""Student against teacher: one table, one picture. See docs/evaluation.md for what is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.cache.paths import CachePaths
from shared.cli.progress import Progress
from shared.errors import UserError
from shared.storage.files import guard
from train.config import EvaluateConfig
from train.evaluation.artist import Artist, open_artist
from train.evaluation.heldout import HeldOut, load_heldout, open_eval_cache
from train.evaluation.nearest import check_copies, open_training
from train.evaluation.record import Evaluation, noted
from train.evaluation.score import (
    Judge,
    Result,
    Sampling,
    Task,
    decode_all,
    open_measures,
)
from train.evaluation.table import write_report
from train.evaluation.teacher_results import (
    REFERENCE,
    STEPS,
    reference_key,
    teacher_calls,
    teacher_reference,
    unet_calls,
)
from train.export.model_card import update_card
from train.export.newest_run import newest_student
from train.export.weights import exported_student
from train.objectives import objective_of
from train.sampling.samplers import most_steps
from train.state.owner import owning

STUDENT_SAMPLINGS = tuple(("student", steps) for steps in STEPS)
MOST_DRAWN = 100  # pictures drawn at once
DRAWN_VALUES = 4 * 128 * 128  # of one channel of their latents
TIMED = 16  # pictures per timing, at most
TRIED = 2  # real pictures that are measured before anything is drawn
SHOWN = 6  # captions in the picture


def evaluate(config: EvaluateConfig) -> None:
    """Write evaluation.json, evaluation.md and evaluation.png, and print the table.

    The model card of the run's export tells it too, unless `--output` is elsewhere.
    """
    check_flags(config)
    run = newest_student(config.run)
    folder = config.output or run
    if config.output is not None:
        with guard(folder):  # before hours of drawing
            folder.mkdir(parents=True, exist_ok=True)
    with owning(folder, "train evaluate", "wait for it, or give --output another folder"):
        artist = open_artist(run, config)
        weights = exported_student(run, artist.config.student)
        cache, manifest = open_eval_cache(config.eval_cache, run, artist.config.cache)
        artist.check_cache(manifest, cache)
        measures = open_measures(config, artist.device)
        heldout = load_heldout(cache, manifest, config.num_samples, measures.space.least)
        few = heldout.first(TRIED)
        measures.try_on(decode_all(artist, few.latents), few.captions)
        training = open_training(config, artist, heldout) if config.nearest_samples else None
        artist = artist.with_teacher(heldout.empty).for_shape(heldout.shape)
        batch_size = pictures_at_once(config, heldout.shape)
        samplings = student_samplings(artist)
        calls = teacher_calls(len(heldout)) + unet_calls(samplings, len(heldout))
        with Progress("evaluate", calls, "step") as progress:
            task = Task(heldout, batch_size, config.seed, progress)
            teacher_mark = artist.teacher_fingerprint()
            key = reference_key(config, cache, batch_size, artist, teacher_mark, measures)
            judge, teacher = teacher_reference(CachePaths(cache), key, artist, task, measures)
            artist = artist.with_spacings(
                {(result.sampler, result.steps): str(result.timestep_spacing) for result in teacher}
            )
            student, usual, drawn = draw_student(samplings, artist, task, judge)
        nearest = None
        if training is not None:
            count = config.nearest_samples
            nearest = check_copies(folder, count, drawn, usual, heldout, training, artist)
        results = timed([*teacher, *student], artist, heldout.first(batch_size))
        evaluation = Evaluation(
            heldout=heldout.digest(),
            num_samples=len(heldout),
            seed=config.seed,
            guidance_scale=artist.guidance_scale,
            eval_cache=str(cache),
            teacher=teacher_mark,
            student=artist.config.student,
            weights=weights,
            eta=artist.eta,
            fd_note=measures.space.distances.few_pictures(*judge.real.shape),
            num_features=judge.real.shape[1],
            nearest=nearest,
            rows=tuple(results),
            **noted(measures),
        )
        columns = showcase(artist, heldout, config.seed)
        write_report(folder, evaluation, columns, heldout.captions)
        still_there = exported_student(run, artist.config.student) == weights
        if folder.resolve() == run.resolve() and still_there:
            update_card(folder)


def check_flags(config: EvaluateConfig) -> None:
    """Raise UserError for a --cache that nothing asks for."""
    if config.cache is not None and not config.nearest_samples:
        raise UserError(
            "--cache is where --nearest-samples searches; the cache to evaluate on is --eval-cache"
        )


def pictures_at_once(config: EvaluateConfig, shape: tuple[int, int, int]) -> int:
    """The flag, else as many latents `(C, h, w)` as a GPU has room for."""
    return config.batch_size or most_at_once(shape)


def most_at_once(shape: tuple[int, int, int]) -> int:
    """How many latents `(C, h, w)` a GPU has room for while they are drawn."""
    return min(MOST_DRAWN, max(1, DRAWN_VALUES // (shape[1] * shape[2])))


def student_samplings(artist: Artist) -> Sequence[Sampling]:
    """A student of few steps is drawn in those it knows, another as the teacher's reference is."""
    if objective_of(artist.config).sampler.classifier_free:
        return (("student", REFERENCE[1]),)
    most = most_steps(artist.config, artist.scheduler_config)
    known = [sampling for sampling in STUDENT_SAMPLINGS if sampling[1] <= most]
    few = objective_of(artist.config).sampler.few_steps(artist.config)
    return tuple(dict.fromkeys([*known, *(("student", steps) for steps in few)]))


def draw_student(
    samplings: Sequence[Sampling], artist: Artist, task: Task, judge: Judge
) -> tuple[list[Result], int, Tensor]:
    """The student's results, its usual number of steps, and what it drew in these.

    Where the table has no line of those, it is the last line's number.
    """
    usual = objective_of(artist.config).sampler.usual_steps(artist.config)
    usual = usual if ("student", usual) in samplings else samplings[-1][1]
    results, kept = [], torch.empty(0)
    for sampling in samplings:
        drawn = task.draw(artist, sampling)
        results.append(judge.measure(*sampling, drawn, artist))
        kept = drawn if sampling[1] == usual else kept
    return results, usual, kept


def timed(results: Sequence[Result], artist: Artist, heldout: HeldOut) -> list[Result]:
    """Add ms per image to all results, measured here and now, so that they can be compared."""
    texts = heldout.texts[slice(0, TIMED)]
    finished = []
    for result in results:
        seconds = []
        for _ in range(1 if result.steps > max(STEPS) else 3):
            start = time.perf_counter()
            artist.draw(result.sampler, result.steps, texts, range(len(texts)))
            if artist.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        finished.append(replace(result, ms_per_image=1000 * min(seconds) / len(texts)))
    return finished


def showcase(artist: Artist, heldout: HeldOut, seed: int) -> dict[str, NDArray[np.uint8]]:
    """The same few captions and noises drawn by each sampler, for the picture."""
    texts = heldout.texts[slice(0, SHOWN)]
    seeds = range(seed, seed + len(texts))
    columns = {}
    for name, steps in [REFERENCE, ("ddim", 4), ("dpmsolver++", 4), *student_samplings(artist)]:
        title = f"{'student' if name == 'student' else 'teacher'}, {steps} step{'s'[: steps > 1]}"
        solver = "" if name == "student" else name.upper()
        columns[f"{title}\n{solver}"] = decode_all(artist, artist.draw(name, steps, texts, seeds))
    return columns
