"""What a run has written about itself so far: flags, metrics, evaluations while it trained."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import UsageError, UserError
from shared.storage.reading import read_if_there
from shared.storage.typed_json import record_of
from shared.wording import counted
from train.config import RunConfig
from train.state.checkpoint import latest_checkpoint, read_progress
from train.state.owner import holder
from train.state.run_config import run_config
from train.trainer.reporting.log_lines import EVALUATIONS, GPU_MEMORY, METRICS, PROCESS_MEMORY

CONFIG = "config.json"
HOUR = 3600.0
NAMED = 8  # runs in a folder that an error names

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Progress:
    """Where in a run numbers belong, by three measures: arrays of one length."""

    step: Numbers
    sample: Numbers  # seen in training
    hour: Numbers  # that the steps took; NaN where a rate is missing


@dataclass(frozen=True)
class Measured:
    """A line of evaluations.jsonl: what the student drew while it trained."""

    step: int
    samples: int
    drawing_steps: int
    num_samples: int
    features: str
    fd: float
    accuracy: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Record:
    """A run as it is now."""

    folder: Path
    name: str
    config: RunConfig
    batch_size: int  # samples a step
    running: bool
    progress: Progress  # of each line of metrics
    metrics: Mapping[str, Numbers]  # by name; NaN in lines that lack it
    measured: tuple[Measured, ...]
    damaged: Mapping[str, int]  # lines that are left out, by file
    trained: int  # steps, by the latest checkpoint

    @property
    def steps(self) -> int:
        """Optimizer steps taken, by the last line of metrics."""
        return int(self.progress.step[-1]) if len(self.progress.step) else 0

    @property
    def reached(self) -> int:
        """Optimizer steps taken, also where the metrics are gone."""
        return max(self.steps, self.trained)

    @property
    def remarks(self) -> list[str]:
        """What of the run's lines cannot be read, in words."""
        return [
            f"{counted(count, 'damaged line')} of {file} {'is' if count == 1 else 'are'} left out"
            for file, count in self.damaged.items()
            if count
        ]

    @property
    def samples(self) -> int:
        """Samples seen by them."""
        return int(self.progress.sample[-1]) if len(self.progress.sample) else 0

    @property
    def seconds(self) -> float | None:
        """How long they took, without pauses and previews; None where a rate is missing."""
        last = float(self.progress.hour[-1]) if len(self.progress.hour) else math.nan
        return last * HOUR if math.isfinite(last) else None

    @property
    def state(self) -> str:
        """How far the run has come, in a word."""
        if self.running:
            return "running"
        return "finished" if self.reached >= self.config.max_train_steps else "unfinished"


def read_records(runs: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """Read runs, each once, in their order; those of one name are told by their paths.

    Returns them, and why others cannot be read. Raises UsageError where none is named, and
    UserError for a folder that is no run, and where not one can be read.
    """
    if not runs:
        raise UsageError("which runs? For example: python -m infer compare runs/a runs/b")
    folders = list({run.resolve(): run for run in runs}.values())
    names = [folder.resolve().name for folder in folders]
    for folder in folders:
        check_no_folder_of_runs(folder)
    records, unread = list[Record](), list[UserError]()
    for folder, name in zip(folders, names, strict=True):
        try:
            records.append(read_record(folder, name if names.count(name) == 1 else str(folder)))
        except UserError as error:
            if not (folder / CONFIG).exists():  # mistyped, not damaged
                raise
            unread.append(error)
    if not records:
        raise unread[0]
    return records, [str(error) for error in unread]


def check_no_folder_of_runs(folder: Path) -> None:
    """Raise UserError, which names them, where runs lie in a folder that is none itself."""
    if (folder / CONFIG).exists():
        return
    inside = sorted({found.parent for found in folder.glob(f"*/{CONFIG}") if is_run(found.parent)})
    if inside:
        named = " ".join(shlex.quote(str(run)) for run in inside[:NAMED])
        more = f" (and {len(inside) - NAMED} more)" if len(inside) > NAMED else ""
        raise UserError(
            f"{folder} is no run, but a folder of runs; give them: "
            f"python -m infer compare {named}{more}"
        )


def is_run(folder: Path) -> bool:
    """Has a training written here, and not only something with a config.json?"""
    return (folder / METRICS).exists() or (folder / "checkpoints").is_dir()


def read_record(folder: Path, name: str) -> Record:
    """Read a run. Raises UserError where it is none, or its flags cannot be read."""
    config = run_config(folder)
    latest = latest_checkpoint(folder)
    latest_state = read_progress(latest) if latest else None
    batch_size = latest_state.batch_size if latest_state else batch_size_of(config)
    found, damaged = read_lines(folder / METRICS)
    lines = [line for line in found if math.isfinite(number(line.get("step")))]
    measured, unreadable = read_measured(folder / EVALUATIONS)
    return Record(
        folder=folder,
        name=name,
        config=config,
        batch_size=batch_size,
        running=holder(folder) is not None,
        progress=progress_of(lines, batch_size),
        metrics={key: column(lines, key) for key in dict.fromkeys(k for one in lines for k in one)},
        measured=measured,
        damaged={METRICS: damaged + len(found) - len(lines), EVALUATIONS: unreadable},
        trained=latest_state.step if latest_state else 0,
    )


def batch_size_of(config: RunConfig) -> int:
    """Samples a step by the flags, of a run without a checkpoint: as many as one process takes."""
    return config.global_batch_size or config.train_batch_size * config.gradient_accumulation_steps


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects in a file's lines, and how many lines are none.

    A last line without an end is being written, and counts as neither, if it begins as an object.
    """
    whole, end, rest = (read_if_there(path) or b"").rpartition(b"\n")
    found = [object_in(line) for line in whole.split(b"\n") if end]
    foreign = not rest.startswith(b"{") and bool(rest)
    return [one for one in found if one is not None], found.count(None) + foreign


def object_in(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line, or None where there is no such."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_measured(path: Path) -> tuple[tuple[Measured, ...], int]:
    """The evaluations while a run trained, and how many lines are none."""
    lines, damaged = read_lines(path)
    found = []
    for line in lines:
        try:
            found.append(record_of(Measured, line, ignore_unknown=True))
        except ValueError:
            damaged += 1
    return tuple(sorted(found, key=lambda one: one.step)), damaged


def column(lines: Sequence[Mapping[str, Any]], name: str) -> Numbers:
    """The numbers of one name, NaN where a line has none."""
    return np.array([number(line.get(name)) for line in lines], np.float64)


def number(value: object) -> float:
    """A JSON number; NaN for anything else, and for what is too large for a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def progress_of(lines: Sequence[Mapping[str, Any]], batch_size: int) -> Progress:
    """Where lines of metrics belong; hours by their rates, as `train compare` counts them."""
    step, rate = column(lines, "step"), column(lines, "samples_per_second")
    told = column(lines, "samples")  # older versions did not
    taken = np.diff(step, prepend=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = np.where(rate > 0, taken * batch_size / rate, math.nan)
    sample = np.where(np.isfinite(told), told, step * batch_size)
    return Progress(step, sample, np.cumsum(seconds) / HOUR)


def peak_memory(record: Record) -> tuple[float, str] | None:
    """The most bytes that the run has had, and whose: `GPU` or `process`; None where untold."""
    for name, whose in ((GPU_MEMORY, "GPU"), (PROCESS_MEMORY, "process")):
        values = record.metrics.get(name, np.empty(0))
        if np.isfinite(values).any():
            return float(np.nanmax(values)), whose
    return None
