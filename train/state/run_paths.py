"""Where a run's cache, teacher and VAE are, whichever folder it is opened from.

config.json keeps paths as they were typed, so that a project can be moved as a whole. Relative ones
are found from the folder that the command was given in, which the run's own path tells.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.storage.ownership import absolute
from shared.storage.urls import is_url

PATHS = ("cache", "model", "vae")


def told(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration to keep: as typed, or absolute where the run's path would not lead to it."""
    if downward(str(config["run"])):
        return dict(config)
    local = {name: str(config[name]) for name in PATHS if is_local(config[name])}
    return {**config, **{name: str(absolute(Path(text))) for name, text in local.items()}}


def found(config: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """The configuration of the run at `run`, with paths that lead to its parts from here."""
    origins = typed_in(str(config.get("run", "")), run)
    names = [name for name in PATHS if isinstance(config.get(name), str)]
    return {**config, **{name: from_here(config[name], origins) for name in names}}


def recorded_cache(text: str, flag: str) -> Path:
    """The cache that a run's configuration names, where it is a folder.

    A run may come from anybody, so an address that it names is not asked. Raises UserError for
    one; `flag` is that by which the user names it.
    """
    if is_url(text):
        raise UserError(
            f"the run was trained on {text}, which is asked only if you name it: pass {flag} {text}"
        )
    return Path(text)


def downward(text: str) -> bool:
    """Is it a relative path that does not leave the current folder?"""
    path = Path(os.path.normpath(text))
    return not path.is_absolute() and ".." not in path.parts


def is_local(text: str | None) -> bool:
    """Does it lead to something on this machine's disks?"""
    return text is not None and not is_url(text) and Path(text).exists()


def typed_in(typed: str, run: Path) -> list[Path]:
    """The folders in which a run that is here was called `typed`: as its path and its links say."""
    if not typed or not downward(typed):
        return []
    depth = len(Path(os.path.normpath(typed)).parts)
    ways = [(path, *path.parents) for path in (absolute(run), run.resolve())]
    return [way[depth] for way in ways if depth < len(way)]


def from_here(text: str, origins: list[Path]) -> str:
    """A path as typed where it leads to the same from here, else a longer one."""
    if is_url(text) or Path(text).is_absolute():
        return text
    for origin in origins:
        if (origin / text).exists():
            same = Path(text).exists() and Path(text).samefile(origin / text)
            return text if same else str(origin / text)
    return text
