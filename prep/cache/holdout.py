"""Samples set aside for evaluation, on which nothing is ever trained.

A sample's key is a hash and a shard is sorted by it. When a cache with `--holdout N` is finished
for the first time, the N smallest keys of all are held out, and `holdout.json` keeps them: whatever
comes or goes later, the same samples stay held out, and none that was trained on becomes one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from shared.cache.manifest import Manifest
from shared.cache.paths import CachePaths
from shared.cache.units import Shard
from shared.errors import UserError
from shared.storage.files import dump_json, guard, parse_record
from shared.storage.reading import read_if_there
from shared.storage.typed_json import not_negative, typed
from shared.storage.update import update
from shared.wording import counted

READERS = 16  # shards that are looked into at once
KEY_BYTES = 16  # of a sample's name, with which its first tar header begins


def ask(cache: CachePaths, count: int | None) -> None:
    """Note that `count` samples are to be held out; 0 for none again, None leaves what was said.

    Another number than before lets them be chosen anew.
    """

    def change(content: bytes | None) -> bytes | None:
        noted = parsed(content, cache).get("count", 0)
        return None if count == noted else dump_json({"count": count})

    if count is not None:
        update(cache.holdout, change, cache.tmp)


def held_out(cache: CachePaths) -> dict[str, Any]:
    """Read holdout.json: `count`, and `keys` once they are chosen; an empty dict without it."""
    return parsed(read_if_there(cache.holdout), cache)


def parsed(content: bytes | None, cache: CachePaths) -> dict[str, Any]:
    """Parse the file's content likewise. Raises UserError where it is damaged."""

    def build(stored: Mapping[str, Any]) -> dict[str, Any]:
        not_negative(count=typed(stored["count"], int, "count"))
        typed(stored.get("keys", []), list[str], "keys")
        return dict(stored)

    remedy = "restore it, or remove it and say `prep finish --holdout N`, which chooses anew"
    return {} if content is None else parse_record(content, cache.holdout, build, remedy)


def choose(cache: CachePaths, manifest: Manifest) -> None:
    """Choose the samples that were asked for, unless that was done.

    Raises UserError where none would be left.
    """
    stored = held_out(cache)
    count, total = stored.get("count", 0), manifest.totals.written
    if not count or "keys" in stored:
        return
    if count >= total:
        raise UserError(
            f"--holdout {count}: the cache has {counted(total, 'sample')}, and some must be left "
            "to train on; `prep finish --holdout N` sets fewer aside"
        )
    bound, keys = 0.0, list[str]()
    while len(keys) < count:
        bound = min(1.0, 2 * bound or (count + 4 * count**0.5) / total)
        found = keys_up_to(cache, manifest.shards, f"{min(int(bound * 2**64), 2**64 - 1):016x}")
        keys = sorted(key for some in found for key in some)
    chosen = dump_json({"count": count, "keys": keys[:count]})

    def change(content: bytes | None) -> bytes | None:
        # Another process may have finished it, too.
        return None if "keys" in parsed(content, cache) else chosen

    update(cache.holdout, change, cache.tmp)


def set_aside(cache: CachePaths, manifest: Manifest) -> Manifest:
    """Mark in the manifest's shards the samples that are held out."""
    keys = set(held_out(cache).get("keys", ()))
    if not keys:
        return manifest
    found = keys_up_to(cache, manifest.shards, max(keys))
    shards = tuple(
        replace(shard, heldout=tuple(i for i, key in enumerate(some) if key in keys))
        for shard, some in zip(manifest.shards, found, strict=True)
    )
    digest = hashlib.sha256("".join(sorted(keys)).encode()).hexdigest()[:16]
    return replace(manifest, shards=shards, holdout=digest)


def keys_up_to(cache: CachePaths, shards: Sequence[Shard], last: str) -> list[list[str]]:
    """Read the first keys of each shard, up to `last`."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda shard: list(_keys(cache, shard, last)), shards))


def _keys(cache: CachePaths, shard: Shard, last: str) -> Iterator[str]:
    path, stride = cache.root / shard.file, shard.layout.stride
    try:
        with guard(path), path.open("rb", 0) as file:
            for number in range(shard.count):
                file.seek(number * stride)
                key = file.read(KEY_BYTES).decode("ascii", "replace")
                if key > last:
                    return
                yield key
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `prep verify --repair` tells how to mend it") from None
