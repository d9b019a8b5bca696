"""Which shards readers of the former manifest may still open."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.errors import UserError
from shared.storage.files import guard


def retire(cache: CachePaths, kept: Collection[str]) -> None:
    """Date the shards that the manifest names and the next one, which names `kept`, will not.

    To be called before the manifest is replaced: `gc` counts their age from now on. Objects
    cannot be dated; there `gc` counts from the manifest.
    """
    if not isinstance(cache.root, Path):
        return
    try:
        former = open_manifest(cache.root, check_sizes=False).shards
    except UserError:  # none, or a damaged one: nobody reads what it names
        return
    date(cache, [shard.file for shard in former if shard.file not in kept])


def date(cache: CachePaths, files: Iterable[str]) -> None:
    """Give files the present time, as far as they are there and can be dated."""
    if isinstance(cache.root, Path):
        for file in files:
            with guard(cache.shards), contextlib.suppress(FileNotFoundError):
                os.utime(cache.root / file)
