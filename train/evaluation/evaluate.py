"""Student against teacher: one table, one picture. See docs/evaluation.md for what is measured."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from numpy.typing import NDArray

from shared.cli.progress import Progress
from shared.errors import UserError
from train.config import EvaluateConfig
from train.evaluation.artist import Artist, open_artist
from train.evaluation.features import FEATURES, few_pictures
from train.evaluation.heldout import HeldOut, load_heldout, with_eval_cache
from train.evaluation.score import Result, Scorer, decode_all, draw_all
from train.evaluation.table import write_report
from train.evaluation.teacher_results import (
    REFERENCE,
    STEPS,
    teacher_calls,
    teacher_reference,
    unet_calls,
)
from train.export.model_card import update_card
from train.export.weights import exported_student

STUDENT_SAMPLINGS = tuple(("student", steps) for steps in STEPS)
MOST_DRAWN = 100  # pictures drawn at once
DRAWN_VALUES = 4 * 128 * 128  # of one channel of their latents
TIMED = 16  # pictures per timing, at most
SHOWN = 6  # captions in the picture


def evaluate(config: EvaluateConfig) -> None:
    """Write evaluation.json, evaluation.md and evaluation.png, and print the table.

    The model card of the run's export tells it too, unless `--output` is elsewhere.
    """
    scorer = load_scorer(config.scorer)
    artist = open_artist(
        config.run,
        config.threads,
        config.device,
        config.guidance_scale,
        config.vae,
        config.model,
    )
    weights = exported_student(config.run, artist.config["student"])
    config, manifest = with_eval_cache(config, str(artist.config["cache"]))
    artist.check_cache(manifest, config.eval_cache)
    heldout = load_heldout(config.eval_cache, manifest, config.num_samples)
    config = with_batch_size(config, heldout.shape)
    artist = artist.with_teacher(heldout.empty).for_shape(heldout.shape)
    student_rows = student_samplings(artist)
    calls = teacher_calls(len(heldout)) + unet_calls(student_rows, len(heldout))
    with Progress("evaluate", calls, "step") as progress:
        judge, teacher = teacher_reference(config, artist, heldout, scorer, progress)
        artist = artist.with_spacings(
            {(row.sampler, row.steps): str(row.timestep_spacing) for row in teacher}
        )
        student = [
            judge.measure(*row, draw_all(artist, row, heldout, config, progress), artist)
            for row in student_rows
        ]
    rows = timed([*teacher, *student], artist, heldout.first(config.batch_size))
    result = {
        "features": FEATURES,
        "num_samples": len(heldout),
        "fd_note": few_pictures(len(heldout)),
        "guidance_scale": artist.guidance_scale,
        "student": artist.config["student"],
        "weights": weights,  # of which student this is told
        "scorer": config.scorer,
        "rows": [asdict(row) for row in rows],
    }
    folder = config.output or config.run
    write_report(folder, result, showcase(artist, heldout, config), heldout.captions)
    still_there = exported_student(config.run, artist.config["student"]) == weights
    if folder.resolve() == config.run.resolve() and still_there:
        update_card(folder)


def with_batch_size(config: EvaluateConfig, shape: tuple[int, int, int]) -> EvaluateConfig:
    """The same with as many latents `(C, h, w)` as a GPU has room for, unless a flag says."""
    if config.batch_size is None:
        fitting = DRAWN_VALUES // (shape[1] * shape[2])
        return replace(config, batch_size=min(MOST_DRAWN, max(1, fitting)))
    return config


def student_samplings(artist: Artist) -> Sequence[tuple[str, int]]:
    """A distilled student is drawn in few steps, a fine-tuned one as the teacher's reference is."""
    return STUDENT_SAMPLINGS if artist.objective.few_steps else (("student", REFERENCE[1]),)


def timed(rows: Sequence[Result], artist: Artist, heldout: HeldOut) -> list[Result]:
    """The rows with ms per image, all measured here and now, so that they can be compared."""
    texts = heldout.texts[slice(0, TIMED)]
    finished = []
    for row in rows:
        seconds = []
        for _ in range(1 if row.steps > max(STEPS) else 3):
            start = time.perf_counter()
            artist.draw(row.sampler, row.steps, texts, range(len(texts)))
            if artist.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        finished.append(replace(row, ms_per_image=1000 * min(seconds) / len(texts)))
    return finished


def showcase(
    artist: Artist, heldout: HeldOut, config: EvaluateConfig
) -> dict[str, NDArray[np.uint8]]:
    """The same few captions and noises drawn by each sampler, for the picture."""
    texts = heldout.texts[slice(0, SHOWN)]
    seeds = range(config.seed, config.seed + len(texts))
    columns = {}
    for name, steps in [REFERENCE, ("ddim", 4), ("dpmsolver++", 4), *student_samplings(artist)]:
        title = f"{'student' if name == 'student' else 'teacher'}, {steps} step{'s'[: steps > 1]}"
        solver = "" if name == "student" else name.upper()
        columns[f"{title}\n{solver}"] = decode_all(artist, artist.draw(name, steps, texts, seeds))
    return columns


def load_scorer(name: str | None) -> Scorer | None:
    """The function that MODULE:FUNCTION names. Raises UserError where there is none."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        scorer: Scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--scorer {name}: {error}; give MODULE:FUNCTION") from None
    return scorer
