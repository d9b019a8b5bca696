"""What a run says of itself: flags, evaluation, how far it has come and how long that took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.errors import UserError
from shared.models.family import Model, recorded_model, resolve_model
from shared.storage.reading import read_if_there
from shared.storage.typed_json import typed
from train.comparison.cost import relative_cost
from train.config import RunConfig
from train.evaluation.record import Evaluation, read_evaluation
from train.export.student import student_file
from train.export.weights import exported_student
from train.state.checkpoint import TrainingState, latest_checkpoint, read_progress
from train.state.run_config import run_config


@dataclass(frozen=True)
class Summary:
    """A run that is compared. What its checkpoints or metrics no longer tell is None."""

    run: Path
    name: str
    config: RunConfig
    model: Model
    evaluation: Evaluation
    cost: float  # of a training step, in those of LCD
    steps: int | None  # optimizer steps taken
    samples: int | None  # seen by them
    seconds: float | None  # that they took


def read_summaries(runs: Sequence[Path], model: str | None) -> list[Summary]:
    """Summarise the runs; `model` is where their teacher is, if not where they say.

    Raises UserError, naming both sides, where two of them cannot be compared.
    """
    names = [run.resolve().name for run in runs]
    found = [
        read_summary(run, name if names.count(name) == 1 else str(run), model)
        for run, name in zip(runs, names, strict=True)
    ]
    for other in found[1:]:
        check_comparable(found[0], other)
    return found


def read_summary(run: Path, name: str, model: str | None) -> Summary:
    """Summarise a run. Raises UserError where its exported student has not been evaluated."""
    config = run_config(run)
    evaluation = read_evaluation(run)
    if not student_file(run, config).exists():
        raise UserError(f"{run} has no exported student; `python -m train export --run {run}`")
    if exported_student(run, config.student) != evaluation.weights:
        raise UserError(
            f"the student that {run} has exported is not the one that was evaluated; "
            f"`python -m train evaluate --run {run}` evaluates it"
        )
    latest = latest_checkpoint(run)
    progress = None if latest is None else read_progress(latest)
    teacher = resolve_model(model or recorded_model(config.model))
    return Summary(
        run=run,
        name=name,
        config=config,
        model=teacher,
        evaluation=evaluation,
        cost=relative_cost(teacher, config, progress.step if progress else config.max_train_steps),
        steps=progress.step if progress else None,
        samples=progress.position if progress else None,
        seconds=training_seconds(run, progress) if progress else None,
    )


def training_seconds(run: Path, progress: TrainingState) -> float | None:
    """How long a run's steps took, by the rates in metrics.jsonl: without pauses and previews.

    Of the steps up to a checkpoint, at which a line ends. None where one is missing or damaged.
    """
    lines = (read_if_there(run / "metrics.jsonl") or b"").splitlines()
    before, seconds = 0, 0.0
    try:
        for line in lines:
            if before >= progress.step:
                break
            numbers = json.loads(line)
            step = typed(numbers["step"], int, "step")
            rate = typed(numbers["samples_per_second"], float, "samples_per_second")
            seconds += (step - before) * progress.batch_size / rate
            before = step
    except (ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError):
        return None
    return seconds if before == progress.step else None


def check_comparable(one: Summary, other: Summary) -> None:
    """Raise UserError, naming both sides, where figures of two runs do not go together."""
    families = one.model.family.name, other.model.family.name
    if families[0] != families[1]:
        raise UserError(
            f"{one.run} is of {families[0]} and {other.run} of {families[1]}; compare runs of one "
            "family"
        )
    here, there = (asdict(each.evaluation.conditions) for each in (one, other))
    if here["heldout"] != there["heldout"]:
        raise UserError(
            f"{one.run} was evaluated on other pictures ({one.evaluation.eval_cache}) than "
            f"{other.run} ({other.evaluation.eval_cache}); give `train evaluate` the same "
            "--eval-cache and --num-samples for both"
        )
    for name, value in here.items():
        if value != there[name]:
            raise UserError(
                f"{one.run} was evaluated with {name} {value}, {other.run} with {there[name]}; "
                "evaluate both alike"
            )
