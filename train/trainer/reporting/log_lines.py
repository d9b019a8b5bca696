"""A run's logs of JSON lines, each about a step: what is cut back when the run goes on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.storage import ownership
from shared.storage.files import guard, publish
from shared.storage.reading import read_if_there
from shared.storage.typed_json import typed

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
# In a line of metrics: the most bytes so far, on the GPU or of the process.
GPU_MEMORY, PROCESS_MEMORY = "peak_gpu_memory_bytes", "peak_process_memory_bytes"


def cut_back(run: Path, step: int) -> None:
    """Leave in a run's logs what is true of its state after `step`."""
    for name in (METRICS, EVALUATIONS):
        keep_until(run / name, step)


def keep_until(path: Path, step: int) -> None:
    """Drop lines past `step`, which a run resumed from there will write again.

    Lines that are damaged go too, and that is said: they are for people, and stop no run.
    """
    lines = (read_if_there(path) or b"").splitlines(keepends=True)
    if not lines:
        return
    steps = [step_of(line) for line in lines]
    if damaged := sum(found is None for found in steps[:-1]):  # the last may have been cut
        print(f"note: {damaged} damaged lines are left out of {path}", file=sys.stderr)
    kept = [line for line, at in zip(lines, steps, strict=True) if at is not None and at <= step]
    publish(kept, path, path.parent / "tmp")


def step_of(line: bytes) -> float | None:
    """The step that a line of metrics is about, or None where it is no such line."""
    try:
        return typed(json.loads(line)["step"], float, "step") if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def steps_in(path: Path) -> set[int]:
    """Return the steps that a log has whole lines about; none where there is no log."""
    found = map(step_of, (read_if_there(path) or b"").splitlines(keepends=True))
    return {int(step) for step in found if step is not None}


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add a line, durably. Raises UserError where the run is another's, or the disk is full."""
    ownership.check(path)
    with guard(path), path.open("a") as file:
        file.write(json.dumps(values) + "\n")
        file.flush()
        os.fsync(file.fileno())
