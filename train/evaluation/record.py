"""What an evaluation has found and under which conditions, as evaluation.json keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.storage.files import load_record
from shared.storage.typed_json import record_of
from train.evaluation.nearest import Nearest
from train.evaluation.score import Measures, Result
from train.measures.scorers import ACCURACY
from train.measures.shapes import FORMERLY, SHAPES

EVALUATION = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What figures depend on besides the student: only under the same they can be compared."""

    heldout: str  # a hash over captions and real pictures
    num_samples: int
    features: str
    seed: int
    guidance_scale: float
    scorer: str | None
    # Fingerprints; older versions had nothing that has weights.
    features_weights: str | None = None
    scorer_weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Conditions):
    """The content of evaluation.json."""

    eval_cache: str  # where it was
    teacher: str  # a fingerprint of its UNet and the VAE
    student: str  # lora, full
    weights: str | None  # the student's fingerprint; None where an older version exported it
    eta: float
    fd_note: str | None
    num_features: int | None = None
    fd_title: str = "FD"  # what the distance of these features is called
    scorer_title: str = ACCURACY
    features_source: str | None = None  # where the weights were from
    scorer_source: str | None = None
    nearest: Nearest | None = None
    rows: tuple[Result, ...]

    @property
    def conditions(self) -> Conditions:
        """Under which they were found."""
        return Conditions(**{one.name: getattr(self, one.name) for one in fields(Conditions)})


def noted(measures: Measures) -> dict[str, Any]:
    """What an evaluation says of its measures, by the fields of Evaluation."""
    space, scorer = measures.space, measures.scorer
    terms = {
        "features": space.name,
        "features_weights": space.weights,
        "features_source": space.source,
        "fd_title": space.title,
    }
    if scorer is None:
        return terms | {"scorer": None}
    return terms | {
        "scorer": scorer.name,
        "scorer_weights": scorer.weights,
        "scorer_source": scorer.source,
        "scorer_title": scorer.title,
    }


def read_evaluation(run: Path) -> Evaluation:
    """Read a run's evaluation. Raises UserError, with the command, where it lacks one."""
    again = f"`python -m train evaluate --run {run}`"

    def build(stored: Mapping[str, Any]) -> Evaluation:
        if "heldout" not in stored:
            raise UserError(
                f"the evaluation of {run} is an older version's, which did not note its captions; "
                f"{again} makes it anew"
            )
        if stored.get("features") == FORMERLY:
            stored = {**stored, "features": SHAPES}
        return record_of(Evaluation, stored)

    if not (run / EVALUATION).is_file():
        raise UserError(f"{run} has not been evaluated; {again} does it")
    return load_record(run / EVALUATION, build, f"{again} makes it anew")
