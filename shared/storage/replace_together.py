"""Files that belong together, replaced so that nobody finds old and new ones side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shared.storage.files import guard, sync_folder, workshop


def replace_together(building: Path, folder: Path, primary: str, companions: Sequence[str]) -> None:
    """Put `primary`, a file or a folder, and such `companions` as `building` holds into `folder`.

    First the former companions go, then the primary is replaced, then the new companions come:
    killed at any moment, what is there is of one set. A companion without a successor is removed.
    Raises UserError when the disk refuses; up to the primary's replacement all is then put back.
    """
    moved: list[tuple[Path, Path]] = []  # from, to
    with workshop(folder / "tmp", "-old") as old, guard(folder):
        try:
            for name in companions:
                if (folder / name).is_file():
                    put(folder / name, old / name)
                    moved.append((folder / name, old / name))
            if (folder / primary).is_dir():  # which cannot be replaced by a rename
                put(folder / primary, old / primary)
                moved.append((folder / primary, old / primary))
            sync_folder(folder)
            put(building / primary, folder / primary)
        except BaseException:
            for source, target in reversed(moved):
                os.replace(target, source)
            raise
        for name in companions:
            if (building / name).is_file():
                put(building / name, folder / name)
                sync_folder((folder / name).parent)
        sync_folder(folder)


def put(source: Path, target: Path) -> None:
    """Rename, into a folder that is made if need be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
