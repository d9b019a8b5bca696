"""Looks at runs again and again, and has the page built anew when they have changed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from infer.compare.contents import Contents, gather
from infer.compare.previews import FOLDER
from shared.errors import UserError
from train.evaluation.record import EVALUATION
from train.state.owner import holder
from train.trainer.reporting.log_lines import EVALUATIONS, METRICS

REFRESH = 10  # seconds after which a page loads itself again
LOOK = 2.0  # seconds between looks at the files
REST = 4.0  # times as long as a build took, at least, nothing is built
WATCHED = ("config.json", METRICS, EVALUATIONS, EVALUATION)

State = tuple[object, ...]


def watch(runs: Sequence[Path], contents: Contents, write: Callable[[Contents, bool], str]) -> None:
    """Write `contents`, then what the runs hold whenever that is something else, until Ctrl-C.

    `write` takes whether the page shall load itself again; the last one shall not. What a run holds
    for a moment and cannot be read is told, and waited out.
    """
    before = state_of(runs)
    error = tell_unread(contents, "")
    try:
        tell(write(contents, True))
        while True:
            before, began = changed(runs, before), time.monotonic()
            try:
                contents = gather(runs)
                tell(write(contents, True))
                error = tell_unread(contents, error)
            except UserError as problem:
                if str(problem) != error:
                    error = str(problem)
                    note(error)
            time.sleep(REST * (time.monotonic() - began))
    finally:
        write(contents, False)


def tell_unread(contents: Contents, before: str) -> str:
    """Tell which runs are left out, where that is not what was told before; returns it."""
    unread = "; ".join(contents.unread)
    if unread and unread != before:
        note(f"left out: {unread}")
    return unread


def note(line: str) -> None:
    """Print a line of what is wrong, at once."""
    print(f"note: {line}", file=sys.stderr, flush=True)


def tell(line: str) -> None:
    """Print a line with the time, at once."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def changed(runs: Sequence[Path], before: State) -> State:
    """Wait until the runs' files are others than `before`; returns what they are."""
    while (now := state_of(runs)) == before:
        time.sleep(LOOK)
    return now


def state_of(runs: Sequence[Path]) -> State:
    """What tells whether a page of these runs would be another: files' times, and who writes."""
    return tuple(part for run in runs for part in parts_of(run))


def parts_of(run: Path) -> Iterator[object]:
    """The same of one run."""
    for name in WATCHED:
        yield stamp(run / name)
    for folder in (run / FOLDER, run / "checkpoints"):
        yield stamp(folder)
    try:
        yield holder(run)
    except UserError:
        yield None


def stamp(path: Path) -> tuple[int, ...]:
    """A file's time and size, or nothing where there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return ()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
