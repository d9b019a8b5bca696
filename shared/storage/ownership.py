"""Folders that this process has taken for itself, and whether they still are its own.

`train.state.owner` takes a run. Whatever is published asks here first (`files.move`), so that a
process that slept while another took over leaves the other's files alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# By the folder's absolute path: raises UserError where the folder has become another's.
taken: dict[Path, Callable[[], None]] = {}


def absolute(path: Path) -> Path:
    """Return a path that stays the same wherever the process goes; links are left as they are."""
    return Path(os.path.abspath(path))


def check(path: Path) -> None:
    """Raise UserError where `path` lies in a folder that was taken and has been lost since."""
    for folder, still_ours in taken.items() if taken else ():
        if absolute(path).is_relative_to(folder):
            still_ours()
