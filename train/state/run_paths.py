"""Where a run's cache, teacher and VAE are, whichever folder it is opened from.

config.json keeps paths as they were typed, so that a project can be moved as a whole. Relative ones
are found from the folder that the command was given in, which the run's own path tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shared.cli.config import coerce
from shared.errors import UserError
from shared.storage.ownership import absolute
from shared.storage.urls import Place, RemotePlace, is_url
from shared.style import join_scale, split_scale
from train.config import RunConfig

PATHS = ("cache", "model", "vae", "init_student", "eval_cache")


def to_keep(config: RunConfig) -> RunConfig:
    """Leave paths as typed, or make them absolute where the run's path would not lead to them."""
    if is_downward(config.run):
        return config

    def whole(text: str) -> str:
        return str(absolute(Path(text))) if Path(text).exists() else text

    return _with_paths(config, whole)


def from_here(config: RunConfig, run: Path) -> RunConfig:
    """Let the paths of the run that lies at `run` lead to its parts from the current folder."""
    origins = folders_typed_in(config.run, run)
    return _with_paths(config, lambda text: path_from_here(text, origins))


def _paths(config: RunConfig) -> dict[str, str]:
    """Those that may be local, by their flags."""
    texts = {name: str(getattr(config, name) or "") for name in PATHS}
    return {name: text for name, text in texts.items() if text and not is_url(text)}


def _with_paths(config: RunConfig, change: Callable[[str], str]) -> RunConfig:
    """The same with `change` made to every local path."""
    texts = {name: change(text) for name, text in _paths(config).items()}
    styles = [split_scale(text) for text in config.teacher_lora]
    worn = tuple(join_scale(change(file), scale) for file, scale in styles)
    return replace(config, **coerce(RunConfig, texts), teacher_lora=worn)


def recorded_cache(cache: Place, flag: str) -> Path:
    """Return the cache that a run's configuration names, where it is a folder.

    A run may come from anybody, so an address that it names is not asked. Raises UserError for
    one; `flag` is that by which the user names it.
    """
    if isinstance(cache, RemotePlace):
        raise UserError(
            f"the run was trained on {cache}, which is asked only if you name it: pass {flag} "
            f"{cache}"
        )
    return cache


def is_downward(path: Path) -> bool:
    """Is it a relative path that does not leave the current folder?"""
    path = Path(os.path.normpath(path))
    return not path.is_absolute() and ".." not in path.parts


def folders_typed_in(typed: Path, run: Path) -> list[Path]:
    """The folders in which a run that is here was called `typed`: as its path and its links say."""
    if not is_downward(typed):
        return []
    depth = len(Path(os.path.normpath(typed)).parts)
    ways = [(path, *path.parents) for path in (absolute(run), run.resolve())]
    return [way[depth] for way in ways if depth < len(way)]


def path_from_here(text: str, origins: list[Path]) -> str:
    """A path as typed where it leads to the same from here, else a longer one."""
    if Path(text).is_absolute():
        return text
    for origin in origins:
        if (origin / text).exists():
            same = Path(text).exists() and Path(text).samefile(origin / text)
            return text if same else str(origin / text)
    return text
