"""The run that a command is about where none is given: the newest that has what it takes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from shared.cli.defaults import RUNS
from shared.errors import UserError
from train.export.student import student_file
from train.state.checkpoint import latest_checkpoint
from train.state.run_config import run_config


def newest_run(run: Path | None, written: Callable[[Path], Path | None], lacks: str) -> Path:
    """The run that is given, else that of `runs/` whose file that `written` names is the newest.

    Says which in the first line. Raises UserError where there is none; `lacks` says of what.
    """
    if run is not None:
        return run
    found = {}
    for config in RUNS.glob("*/config.json"):
        with contextlib.suppress(UserError):  # of a damaged one, which is not the one meant
            file = written(config.parent)
            if file is not None and file.exists():
                found[file.stat().st_mtime_ns] = config.parent
    if not found:
        raise UserError(
            f"no run in {RUNS}/ has {lacks}; `python -m train distill` makes one, or pass --run"
        )
    newest = found[max(found)]
    print(f"run {newest}, the newest of {RUNS}/ (--run chooses another)", file=sys.stderr)
    return newest


def newest_student(run: Path | None) -> Path:
    """The run whose student was written last, unless one is given."""
    return newest_run(run, lambda one: student_file(one, run_config(one)), "a student yet")


def newest_checkpoint(run: Path | None) -> Path:
    """The run whose checkpoint was written last, unless one is given."""
    return newest_run(run, latest_checkpoint, "a checkpoint yet")
