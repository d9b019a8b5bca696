"""The folders and files below a folder, through links, without litter."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prep.files.litter import is_litter
from shared.errors import UserError
from shared.sanitize import printable


@dataclass
class Level:
    """A folder of the tree: names of files, by their stem and lower-case extension."""

    path: str  # within the folder that is listed, with a slash at its end unless it is that
    names: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    stems: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, name: str) -> None:
        """Take in a file."""
        stem, extension = os.path.splitext(name)
        self.names.append(name)
        self.stems[stem].setdefault(extension[1:].lower(), name)

    def beside(self, name: str, *extensions: str) -> str:
        """Find the file beside a picture of one of these extensions: NAME.txt or NAME.jpg.txt."""
        for stem in (os.path.splitext(name)[0], name):
            for extension in extensions:
                if found := self.stems.get(stem, {}).get(extension):
                    return found
        return ""


def walk(root: Path, ends: Collection[str] = ()) -> Iterator[Level]:
    """Each folder of the tree once, real ones before those that are linked to; no litter.

    Below a folder that has a file of a name in `ends` nothing is looked at. A link to a folder
    that this one lies in leads round, or to far more than is meant.
    """
    above = set(map(str, root.resolve().parents))
    seen: set[tuple[int, int]] = set()
    real, linked = [""], list[str]()
    while real or linked:
        path = real.pop() if real else linked.pop(0)
        stat = os.stat(root / path)
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        level, below = Level(path), list[str]()
        for entry in _entries(root / path):
            if is_litter(entry.name):
                continue
            if not _is_folder(entry):
                level.add(entry.name)
                continue
            level.folders.append(entry.name)
            if not entry.is_symlink():
                below.append(f"{path}{entry.name}/")
            elif os.path.realpath(entry.path) not in above:
                linked.append(f"{path}{entry.name}/")
        if any(name in level.names for name in ends):
            linked = [link for link in linked if not link.startswith(path)]
        else:
            real += reversed(below)
        yield level


def _entries(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        shown = printable(str(path))
        raise UserError(f"{shown}: the folder cannot be listed ({error.strerror})") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
