"""The teacher's rows, kept in the evaluation cache for the next student."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from shared.errors import UserError
from shared.storage.files import dump_json, load_record, publish
from shared.storage.reading import read_if_there
from shared.storage.tensors import tensor_chunks
from shared.storage.typed_json import typed
from shared.storage.urls import Place
from train.evaluation.artist import Artist
from train.evaluation.heldout import HeldOut
from train.evaluation.score import Judge, Measures, Result, decode_all
from train.measures.sharpness import energies

Samplings = Sequence[tuple[str, int]]


def kept_reference(
    path: Place,
    samplings: Samplings,
    artist: Artist,
    heldout: HeldOut,
    measures: Measures,
) -> tuple[Judge, list[Result]] | None:
    """A reference from an earlier evaluation, or None where there is none.

    A damaged one is none, too, and a note says so. What an older version kept has neither the
    pictures' features nor intervals: the features are measured anew, and its rows have no
    intervals.
    """
    try:
        content = read_if_there(path)
        if content is None:
            return None
        results = load_record(path.with_suffix(".json"), kept_results(samplings), "delete it")
        tensors = checked(load(content), heldout)
    except (UserError, SafetensorError, KeyError) as error:
        print(f"note: {path} is damaged ({error}); the teacher is drawn anew", file=sys.stderr)
        return None
    solution = tensors["solution"]
    if "real" in tensors:
        real, sharpness = (tensors[name].double().numpy() for name in ("real", "energies"))
    else:
        print(
            f"note: the teacher's rows are an older version's and have no intervals; delete {path} "
            "and they are drawn anew",
            file=sys.stderr,
        )
        real = measures.space.features(decode_all(artist, heldout.latents))
        sharpness = energies(decode_all(artist, solution))
    return Judge(measures, real, heldout.captions, solution, sharpness), results


def kept_results(samplings: Samplings) -> Callable[[Mapping[str, Any]], list[Result]]:
    """What reads rows of these samplers and steps; it raises ValueError for others."""

    def build(stored: Mapping[str, Any]) -> list[Result]:
        results: list[Result] = typed(stored["rows"], list[Result], "rows")
        if [(one.sampler, one.steps) for one in results] != list(samplings):
            raise ValueError("the rows are others than the teacher's")
        return results

    return build


def checked(tensors: Mapping[str, Tensor], heldout: HeldOut) -> Mapping[str, Tensor]:
    """The same. Raises UserError for other shapes than these captions', and for what is no number.

    Raises KeyError where one is missing.
    """
    shapes = {"solution": list(heldout.latents.shape)}
    if "real" in tensors:  # an older version kept the mean and the covariance of these
        shapes |= {"real": [len(heldout), tensors["real"].shape[-1]], "energies": [len(heldout), 2]}
    for name, shape in shapes.items():
        if list(tensors[name].shape) != shape:
            raise UserError(f"its {name} has shape {list(tensors[name].shape)}, not {shape}")
        if not tensors[name].isfinite().all():
            raise UserError("its numbers are not finite")
    return tensors


def keep_reference(path: Place, tmp: Path, judge: Judge, results: Sequence[Result]) -> None:
    """Store a reference for the next evaluation; a read-only cache goes without."""
    real = judge.real.astype(np.float32)  # all that a network gives
    tensors = {
        "real": torch.from_numpy(real if np.array_equal(real, judge.real) else judge.real),
        "energies": torch.from_numpy(judge.energies),
        "solution": judge.solution,
    }
    try:
        rows = {"rows": [asdict(result) for result in results]}
        publish([dump_json(rows)], path.with_suffix(".json"), tmp)
        publish(tensor_chunks(tensors), path, tmp)
    except (OSError, UserError) as error:
        print(f"the teacher's rows are not kept for next time: {error}")
