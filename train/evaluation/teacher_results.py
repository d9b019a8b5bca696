"""The teacher's side of the table, each solver with its best timestep spacing."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from shared.cache.paths import CachePaths
from shared.errors import UserError
from shared.storage.files import dump_json, load_record, publish
from shared.storage.reading import read_file, read_if_there
from shared.storage.tensors import tensor_chunks
from shared.storage.typed_json import typed
from shared.storage.urls import Place
from train.config import EvaluateConfig
from train.evaluation.artist import Artist
from train.evaluation.features import (
    FEATURE_COUNT,
    FEATURES,
    Gaussian,
    features,
    frechet_distance,
    high_frequency_share,
)
from train.evaluation.heldout import HeldOut
from train.evaluation.score import Judge, Result, Sampling, Scorer, Task, decode_all

STEPS = (1, 2, 4, 8)
REFERENCE = ("ddim", 50)
SOLVER_SAMPLINGS = tuple((solver, steps) for solver in ("ddim", "dpmsolver++") for steps in STEPS)
TEACHER_SAMPLINGS = (REFERENCE, *SOLVER_SAMPLINGS)
SPACINGS = ("trailing", "leading", "linspace")
TRIED = 300  # captions that a spacing is chosen on
KEPT = "teacher's rows from an earlier evaluation"


def unet_calls(samplings: Sequence[Sampling], count: int) -> int:
    """UNet evaluations that drawing `count` captions takes: one per picture and step."""
    return count * sum(steps for _, steps in samplings)


def teacher_calls(count: int) -> int:
    """Likewise for everything that `teacher_reference` draws."""
    tried = (len(SPACINGS) - 1) * unet_calls(SOLVER_SAMPLINGS, min(TRIED, count))
    return unet_calls(TEACHER_SAMPLINGS, count) + tried


def teacher_reference(
    cache: CachePaths, key: str, artist: Artist, task: Task, scorer: Scorer | None
) -> tuple[Judge, list[Result]]:
    """The teacher's results and what students are judged by.

    They depend on the teacher and the evaluation cache alone, so they are kept in the cache's
    `evaluations/` folder, as `key`, and the next student's evaluation finds them.
    """
    heldout = task.heldout
    kept = cache.root / "evaluations" / f"{key}.safetensors"
    if (found := kept_reference(kept, heldout, scorer)) is not None:
        task.progress.update(teacher_calls(len(heldout)), KEPT)
        return found
    real = Gaussian.of(features(decode_all(artist, heldout.latents)))
    solution = task.draw(artist, REFERENCE)
    sharpness = high_frequency_share(decode_all(artist, solution))
    judge = Judge(real, heldout.captions, scorer, solution, sharpness)
    results = [judge.measure(*REFERENCE, solution, artist)]
    few = task.first(TRIED)
    shown = Gaussian.of(features(decode_all(artist, few.heldout.latents)))
    for sampling in SOLVER_SAMPLINGS:
        spaced, first = best_spacing(artist, sampling, few, shown)
        rest = task.draw(spaced, sampling, first=len(few.heldout))
        results.append(judge.measure(*sampling, torch.cat([first, rest]), spaced))
    keep_reference(kept, cache.tmp, judge, results)
    return judge, results


def kept_reference(
    path: Place, heldout: HeldOut, scorer: Scorer | None
) -> tuple[Judge, list[Result]] | None:
    """A reference from an earlier evaluation, or None where there is none.

    A damaged one is none, too, and a note says so.
    """

    def build(stored: Mapping[str, Any]) -> tuple[float, list[Result]]:
        results = typed(stored["rows"], list[Result], "rows")
        if [(one.sampler, one.steps) for one in results] != list(TEACHER_SAMPLINGS):
            raise ValueError("the rows are others than the teacher's")
        return typed(stored["sharpness"], float, "sharpness"), results

    try:
        content = read_if_there(path)
        if content is None:
            return None
        sharpness, results = load_record(path.with_suffix(".json"), build, "delete it")
        tensors = load(content)
        mean, covariance, solution = (tensors[name] for name in ("mean", "covariance", "solution"))
        shapes = [list(tensor.shape) for tensor in (mean, covariance, solution)]
        if shapes != [[FEATURE_COUNT], [FEATURE_COUNT] * 2, list(heldout.latents.shape)]:
            raise UserError(f"its tensors have shapes {shapes}")
        if not all(tensor.isfinite().all() for tensor in (mean, covariance, solution)):
            raise UserError("its numbers are not finite")
    except (UserError, SafetensorError, KeyError) as error:
        print(f"note: {path} is damaged ({error}); the teacher is drawn anew", file=sys.stderr)
        return None
    real = Gaussian(mean.numpy(), covariance.numpy())
    return Judge(real, heldout.captions, scorer, solution, sharpness), results


def best_spacing(
    artist: Artist, sampling: Sampling, few: Task, shown: Gaussian
) -> tuple[Artist, Tensor]:
    """The spacing with the lowest Fréchet distance for a solver's steps, and what it drew.

    Which it is depends on teacher and guidance, so solvers are at their best only if it is
    measured. Few captions suffice because they are compared with the pictures of the same
    captions, `shown`: what chance put into those is on both sides.
    """
    best = (math.inf, artist, torch.empty(0))
    for spacing in SPACINGS:
        spaced = artist.with_spacings({sampling: spacing})
        drawn = few.draw(spaced, sampling)
        found = Gaussian.of(features(decode_all(artist, drawn)))
        best = min(best, (frechet_distance(shown, found), spaced, drawn), key=lambda one: one[0])
    return best[1:]


def keep_reference(path: Place, tmp: Path, judge: Judge, results: Sequence[Result]) -> None:
    """Store a reference for the next evaluation; a read-only cache goes without."""
    tensors = {
        "mean": torch.from_numpy(judge.real.mean),
        "covariance": torch.from_numpy(judge.real.covariance),
        "solution": judge.solution,
    }
    table = {"sharpness": judge.sharpness, "rows": [asdict(result) for result in results]}
    try:
        publish([dump_json(table)], path.with_suffix(".json"), tmp)
        publish(tensor_chunks(tensors), path, tmp)
    except (OSError, UserError) as error:
        print(f"the teacher's rows are not kept for next time: {error}")


def reference_key(
    config: EvaluateConfig, cache: Place, batch_size: int, artist: Artist, teacher: str
) -> str:
    """A hash over all that the results of a teacher with this fingerprint depend on."""
    parts = {
        "teacher": teacher,
        "cache": hashlib.sha256(read_file(cache / "manifest.json")).hexdigest(),
        "samples": config.num_samples,
        "seed": config.seed,
        "guidance_scale": artist.guidance_scale,
        "scorer": config.scorer,
        "features": FEATURES,
        "rows": TEACHER_SAMPLINGS,
        "spacings": (SPACINGS, TRIED),
        "batch_size": batch_size,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
