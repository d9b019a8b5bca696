"""Tidying a cache: what was written and is no part of it any more."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from prep.config import GcConfig
from shared.cache.answers_store import answers_of, open_answers, read_answers
from shared.cache.manifest import iterate_units, open_manifest
from shared.cache.paths import CachePaths
from shared.errors import UserError
from shared.storage.files import file_sizes, guard
from shared.storage.temporary import strays, sweep
from shared.wording import counted, size_of

KEPT_SECONDS = 24 * 3600.0
# How `prep encode` names what it writes; nothing else is ever touched.
OURS = {
    "shards": re.compile(r".+-\d+x\d+-[0-9a-f]{12}\.tar"),
    "samples": re.compile(r".+-[0-9a-f]{12}\.parquet"),
    "answers/shards": re.compile(r".+-\d+x\d+-[0-9a-f]{12}\.tar"),
}


def gc(config: GcConfig) -> None:
    """Remove shards and tables that no record names, and strays in tmp/; say what was freed.

    Safe while an encode or a training runs. An encode writes a unit's files first and its record
    seconds later, and a trainer that read the former manifest opens a shard when it first needs
    it: so a file that no record names stays for a day after it was written or was last named
    (`retire`), unless `all` says that nothing is running. Files are listed before records are
    read, so one that is committed in between counts as named. What the manifest names stays too,
    even if its record is gone. Raises UserError, before anything is removed, where the folder is
    no cache or a record cannot be read.
    """
    cache = CachePaths(config.cache)
    if not cache.identity.exists():
        raise UserError(f"{cache.root} is not a cache (no identity.json); nothing was removed")
    candidates = list(written_files(cache))
    named = names_in_use(cache)
    unnamed = [cache.root / name for name in candidates if name not in named]
    removed, young, freed = 0, 0, 0
    dropped = last_named(cache)
    for path in unnamed:
        try:
            stat = path.stat()  # again: an encode may just have written it anew
        except FileNotFoundError:
            continue
        if time.time() - max(stat.st_mtime, dropped) < KEPT_SECONDS and not config.all:
            young += 1
            continue
        if config.dry_run:
            print(f"{path}  {size_of(stat.st_size)}")
        else:
            with guard(path.parent):
                path.unlink(missing_ok=True)
        removed, freed = removed + 1, freed + stat.st_size
    left = list(strays(cache.tmp, config.all))
    freed += sum(bytes_of(path) for path in left)
    if not config.dry_run:
        with guard(cache.tmp):
            sweep(cache.tmp, config.all)
    kept = f"; {young} in use less than a day ago kept, which --all removes" if young else ""
    print(
        f"{cache.root}: {counted(removed, 'file')} and {counted(len(left), 'stray')} in tmp/ "
        f"{'would be ' if config.dry_run else ''}removed, {freed:,} bytes "
        f"({size_of(freed)}){' freed' if not config.dry_run else ''}{kept}"
    )


def last_named(cache: CachePaths) -> float:
    """When, at the latest, objects that nothing names were named; 0 where files are dated."""
    if isinstance(cache.root, Path):
        return 0.0
    # --overwrite removes the manifest when it replaces the identity.
    last = [cache.manifest if cache.manifest.exists() else cache.identity]
    last += [path for path in [answers_of(cache).manifest] if path.exists()]
    return max(float(path.stat().st_mtime) for path in last)


def written_files(cache: CachePaths) -> Iterator[str]:
    """Name shards and tables of any age that an encode may have written."""
    for folder, ours in OURS.items():
        for name in (f"{folder}/{found}" for found in file_sizes(cache.root / folder)):
            path = cache.root / name
            if ours.fullmatch(path.name) and not (isinstance(path, Path) and path.is_symlink()):
                yield name


def names_in_use(cache: CachePaths) -> set[str]:
    """Files that a unit's record or the manifest names, relative to the cache."""
    named = set()
    for unit in iterate_units(cache):
        named.add(unit.samples)
        named.update(shard.file for shard in unit.shards)
    if cache.manifest.exists():
        manifest = open_manifest(cache.root, check_sizes=False)
        named.update(shard.file for shard in manifest.shards)
    for record in read_answers(cache).values():
        named.update(f"answers/{shard.file}" for shard in record.shards)
    if answers := open_answers(cache.root, check_sizes=False):
        named.update(f"answers/{shard.file}" for shard in answers.shards)
    return named


def bytes_of(path: Path) -> int:
    """Size of a file, or of all files in a folder; nothing where it is gone."""
    try:
        if path.is_dir():
            return sum(bytes_of(inner) for inner in path.iterdir())
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
