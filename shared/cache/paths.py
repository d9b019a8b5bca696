"""Where things are in a cache, and which format this version reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.storage.files import free_bytes
from shared.storage.temporary import scratch
from shared.storage.urls import Place
from shared.wording import size_of

FORMAT = 1


class _Inside:
    """A property: the file or folder of this name in the cache."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, cache: CachePaths, _: type[CachePaths]) -> Place:
        return cache.root / self.name


@dataclass(frozen=True)
class CachePaths:
    """Where things are in a cache, which is a folder or behind a URL."""

    root: Place

    identity = _Inside("identity.json")
    manifest = _Inside("manifest.json")
    conditioning = _Inside("conditioning.safetensors")
    holdout = _Inside("holdout.json")
    units = _Inside("units")
    shards = _Inside("shards")
    samples = _Inside("samples")

    @property
    def tmp(self) -> Path:
        """Folder for what is not published yet; of a remote cache a local one, by its URL."""
        return self.root / "tmp" if isinstance(self.root, Path) else scratch(str(self.root))

    @property
    def disk(self) -> Path:
        """Folder on whose disk files take room: of a remote cache where they await their upload."""
        return self.root if isinstance(self.root, Path) else self.tmp


def refuse_full_disk(cache: CachePaths, needed: int) -> None:
    """Raise UserError where the disk that the cache is written to has no `needed` bytes free."""
    if (free := free_bytes(cache.disk)) < needed:
        other = "choose another --cache"
        if not isinstance(cache.root, Path):
            other = "set TMPDIR to a folder with more"
        raise UserError(
            f"{cache.disk}: about {size_of(needed)} are needed at a time and {size_of(free)} "
            f"are free; free some space or {other}"
        )


def refuse_format(stored: Mapping[str, Any], root: Place) -> None:
    """Raise UserError for a manifest or an identity of another format than this version's."""
    if (found := stored.get("format")) != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        remedy = "update, a newer version wrote it" if newer else "encode anew"
        raise UserError(
            f"{root} has cache format {found!s:.40}, this version reads {FORMAT}: {remedy}"
        )
