"""The teacher's side of the table, each solver with its best timestep spacing."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shared.cache.paths import CachePaths
from shared.storage.reading import read_file
from shared.storage.urls import Place
from train.config import EvaluateConfig
from train.evaluation.artist import Artist
from train.evaluation.kept_rows import keep_reference, kept_reference
from train.evaluation.score import Judge, Measures, Result, Sampling, Task, decode_all
from train.measures.shapes import FORMERLY, SHAPES
from train.measures.sharpness import energies
from train.measures.space import Rows, Space

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
    cache: CachePaths, key: str, artist: Artist, task: Task, measures: Measures
) -> tuple[Judge, list[Result]]:
    """The teacher's results and what students are judged by.

    They depend on the teacher and the evaluation cache alone, so they are kept in the cache's
    `evaluations/` folder, as `key`, and the next student's evaluation finds them.
    """
    heldout, space = task.heldout, measures.space
    kept = cache.root / "evaluations" / f"{key}.safetensors"
    found = kept_reference(kept, TEACHER_SAMPLINGS, artist, heldout, measures)
    if found is not None:
        task.progress.update(teacher_calls(len(heldout)), KEPT)
        return found
    real = space.features(decode_all(artist, heldout.latents))
    solution = task.draw(artist, REFERENCE)
    sharpness = energies(decode_all(artist, solution))
    judge = Judge(measures, real, heldout.captions, solution, sharpness)
    results = [judge.measure(*REFERENCE, solution, artist)]
    few = task.first(TRIED)
    shown = space.features(decode_all(artist, few.heldout.latents))
    for sampling in SOLVER_SAMPLINGS:
        spaced, first = best_spacing(artist, sampling, few, space, shown)
        rest = task.draw(spaced, sampling, first=len(few.heldout))
        results.append(judge.measure(*sampling, torch.cat([first, rest]), spaced))
    keep_reference(kept, cache.tmp, judge, results)
    return judge, results


def best_spacing(
    artist: Artist, sampling: Sampling, few: Task, space: Space, shown: Rows
) -> tuple[Artist, Tensor]:
    """The spacing with the lowest distance for a solver's steps, and what it drew.

    Which it is depends on teacher and guidance, so solvers are at their best only if it is
    measured. Few captions suffice because they are compared with the pictures of the same
    captions, whose features are `shown`: what chance put into those is on both sides.
    """
    best = (math.inf, artist, torch.empty(0))
    for spacing in SPACINGS:
        spaced = artist.with_spacings({sampling: spacing})
        drawn = few.draw(spaced, sampling)
        found = space.features(decode_all(artist, drawn))
        best = min(best, (space.distance(shown, found), spaced, drawn), key=lambda one: one[0])
    return best[1:]


def reference_key(
    config: EvaluateConfig,
    cache: Place,
    batch_size: int,
    artist: Artist,
    teacher: str,
    measures: Measures,
) -> str:
    """A hash over all that the results of a teacher with this fingerprint depend on."""
    space, scorer = measures.space, measures.scorer
    parts = {
        "teacher": teacher,
        "cache": hashlib.sha256(read_file(cache / "manifest.json")).hexdigest(),
        "samples": config.num_samples,
        "seed": config.seed,
        "guidance_scale": artist.guidance_scale,
        "scorer": scorer and known_as(scorer.name, scorer.weights),
        # What older versions kept is found, too.
        "features": FORMERLY if space.name == SHAPES else known_as(space.name, space.weights),
        "rows": TEACHER_SAMPLINGS,
        "spacings": (SPACINGS, TRIED),
        "batch_size": batch_size,
    }
    if measures.precision_recall:  # otherwise the key is that of older versions
        parts["precision_recall"] = True
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def known_as(name: str, weights: str | None) -> str:
    """A space's or scorer's name, followed by its weights' fingerprint if it has any."""
    return f"{name} {weights}" if weights else name
