"""A cache's samples as arrays, one per latent size, wherever the shards are."""

from __future__ import annotations

import json
import re
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from shared.cache.layout import BLOCK, Layout
from shared.cache.manifest import Manifest
from shared.cache.units import Shard
from shared.errors import UserError
from train.data.local import LocalReader, Span
from train.data.local_cache import KeepingReader, LocalCache
from train.data.remote import RemoteReader

Reader = LocalReader | RemoteReader
Rows = tuple[tuple[str, int], ...]  # fields and which of their rows, as they lie in the sample

KEY_DIGITS = 16
KEY = re.compile("[0-9a-f]{16}")
JOIN = 4096  # gaps up to here (tar and npy headers) are read along: one request, not two
RUNS = 256  # kept; a sample has at most views x captions

_gap = memoryview(bytearray(JOIN))  # where gaps go; nobody looks at it


class Bucket:
    """The shards of one layout as one array of samples, numbered as the manifest lists them.

    Without those that are held out, or of these alone.
    """

    def __init__(
        self,
        root: Any,
        layout: Layout,
        shards: Sequence[Shard],
        local: LocalCache | None = None,
        heldout: bool = False,
    ) -> None:
        self.layout, self.shards = layout, shards
        self.layouts = [layout] * len(shards)
        self.paths = [root / shard.file for shard in shards]
        self.ends = list(accumulate(samples_of(shard, heldout) for shard in shards))
        self.picked = [shard.heldout for shard in shards] if heldout else None
        # How many of a shard's samples stand before each that is left out.
        self.left_out = [[n - i for i, n in enumerate(shard.heldout)] for shard in shards]
        self.remote = not isinstance(root, Path)
        self._runs = lru_cache(RUNS)(lambda rows: runs(layout, rows))
        remote = open_reader(self.paths, [layout.stride] * len(shards))
        self._reader: Reader | KeepingReader = remote
        if local is not None and isinstance(remote, RemoteReader):
            self._reader = KeepingReader(remote, local, shards, layout.stride)

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, number: int) -> tuple[int, int]:
        """Return the shard and byte offset of a sample."""
        shard = bisect_right(self.ends, number)
        index = number - (self.ends[shard - 1] if shard else 0)
        if self.picked is not None:
            index = self.picked[shard][index]
        else:
            index += bisect_right(self.left_out[shard], index)
        return shard, index * self.layout.stride

    def spans(self, number: int, rows: Rows, views: Sequence[memoryview]) -> list[Span]:
        """Find where these rows of a sample's fields lie; each goes to its memory in `views`."""
        shard, start = self.locate(number)
        return [
            Span(shard, start + offset, nbytes,
                 tuple([views[part] if isinstance(part, int) else part for part in parts]))
            for offset, nbytes, parts in self._runs(rows)
        ]  # fmt: skip

    def start(self, spans: Sequence[Span]) -> list[Span]:
        """Start reading without waiting; returns what `finish` must still be given."""
        return self._reader.start(spans)

    def finish(self, spans: Sequence[Span]) -> None:
        """Wait until all is filled. Raises UserError, naming the sample, where it cannot be."""
        self._reader.finish(spans)

    def read(self, number: int, name: str, row: int, into: NDArray[Any]) -> None:
        """Read a row of a sample's field into a contiguous array. Raises UserError as `finish`."""
        view = into.data.cast("B")
        self.finish(self.start(self.spans(number, ((name, row),), [view])))

    def heads(self, shards: Sequence[int]) -> list[bytearray]:
        """Read header and record of these shards' first samples. Raises UserError as `finish`."""
        found = [bytearray(self.layout.head_bytes) for _ in shards]
        pairs = zip(shards, found, strict=True)
        self._reader.peek([Span(n, 0, len(head), (memoryview(head),)) for n, head in pairs])
        return found

    def records(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Read samples' KEY.json. Raises UserError where one is damaged."""
        found = [bytearray(self.layout.record_bytes) for _ in numbers]
        spans = []
        for number, record in zip(numbers, found, strict=True):
            shard, start = self.locate(number)
            spans.append(Span(shard, start + BLOCK, len(record), (memoryview(record),)))
        self.finish(self.start(spans))
        return [self._parsed(*pair) for pair in zip(numbers, found, strict=True)]

    def num_captions(self, numbers: Sequence[int]) -> list[int]:
        """Return how many captions these samples have. Raises UserError as `records` does."""
        if self.layout.captions == 1:  # then no record need be read
            return [1] * len(numbers)
        found: list[int] = []
        for number, record in zip(numbers, self.records(numbers), strict=True):
            found.append(self._captions_of(number, record))
        return found

    def _captions_of(self, number: int, record: dict[str, Any]) -> int:
        count = record.get("num_captions")
        if type(count) is not int or not 1 <= count <= self.layout.captions:
            raise self._damaged_record(number)
        return count

    def keys(self, numbers: Sequence[int]) -> list[tuple[str, int]]:
        """Read samples' keys, and how many captions each has. Raises UserError as `records`."""
        several = self.layout.captions > 1  # else the name in the first header is enough
        found = [bytearray(self.layout.head_bytes if several else KEY_DIGITS) for _ in numbers]
        places = zip(map(self.locate, numbers), found, strict=True)
        spans = [Span(*place, len(head), (memoryview(head),)) for place, head in places]
        self.finish(self.start(spans))
        keys = []
        for number, head in zip(numbers, found, strict=True):
            key, captions = head[:KEY_DIGITS].decode("latin-1"), 1
            if not KEY.fullmatch(key):
                raise self._damaged_record(number)
            if several:
                captions = self._captions_of(number, self._parsed(number, head[BLOCK:]))
            keys.append((key, captions))
        return keys

    def record(self, number: int) -> dict[str, Any]:
        """Read a sample's KEY.json."""
        return self.records([number])[0]

    def _parsed(self, number: int, record: bytearray) -> dict[str, Any]:
        try:
            return dict(json.loads(record))
        except (ValueError, TypeError, RecursionError):
            raise self._damaged_record(number) from None

    def _damaged_record(self, number: int) -> UserError:
        return UserError(
            f"{self.name(number)} has a damaged record; `prep verify` lists the damage"
        )

    def name(self, number: int) -> str:
        """Return how errors call a sample."""
        shard, start = self.locate(number)
        return f"{self.paths[shard]} sample {start // self.layout.stride}"

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()


def runs(layout: Layout, rows: Rows) -> list[tuple[int, int, list[int | memoryview]]]:
    """Return what of these rows lies together: offset, bytes, rows; gaps have memory instead."""
    found: list[tuple[int, int, list[int | memoryview]]] = []
    for part, (name, row) in enumerate(rows):
        field = layout.field(name)
        assert field is not None
        nbytes = field.nbytes // field.shape[0]
        offset = layout.offsets[name] + row * nbytes
        if found:
            start, length, parts = found[-1]
            gap = offset - start - length
            if 0 <= gap <= JOIN:
                between = [_gap[:gap]] if gap else []
                found[-1] = (start, length + gap + nbytes, [*parts, *between, part])
                continue
        found.append((offset, nbytes, [part]))
    return found


def open_buckets(
    root: Any,
    manifest: Manifest,
    local_cache: Path | None = None,
    max_samples: int | None = None,
    heldout: bool = False,
) -> list[Bucket]:
    """Return a bucket for each layout of the manifest that has samples, in its order.

    With `heldout` those that are set aside, otherwise all the others.

    `root` is a Path, or the UPath of a remote cache, whose samples `local_cache` keeps.
    `max_samples` takes the first so many samples, shard after shard as the manifest lists them.
    Raises UserError for a `local_cache` that cannot be.
    """
    taken = first_samples(manifest.shards, max_samples)
    local = None
    if local_cache is not None:
        if isinstance(root, Path):
            raise UserError(f"--local-cache is for remote caches, {root} is local: leave it out")
        local = LocalCache(local_cache)
        print(local.announce(taken), file=sys.stderr)
    shards: dict[Layout, list[Shard]] = {layout: [] for layout in manifest.layouts}
    for shard in taken:
        shards[shard.layout].append(shard)
    return [
        Bucket(root, layout, mine, local, heldout)
        for layout, mine in shards.items()
        if sum(samples_of(shard, heldout) for shard in mine)
    ]


def largest_bucket(root: Any, manifest: Manifest, heldout: bool = False) -> Bucket:
    """Return the bucket with the most samples. Raises UserError for a cache that has none."""
    buckets = open_buckets(root, manifest, heldout=heldout)
    if not buckets:
        raise UserError(f"{root} holds no samples")
    return max(buckets, key=len)


def first_samples(shards: Sequence[Shard], count: int | None) -> list[Shard]:
    """Return the shards that hold the first `count` samples, the last of them with fewer samples.

    Those that are held out do not count.
    """
    if count is None:
        return list(shards)
    taken = []
    for shard in shards:
        if count <= 0:
            break
        taken.append(replace(shard, count=min(shard.trained, count) + len(shard.heldout)))
        count -= shard.trained
    return taken


def samples_of(shard: Shard, heldout: bool) -> int:
    """Return how many samples of a shard are held out, or are not."""
    return len(shard.heldout) if heldout else shard.trained


def open_reader(paths: Sequence[Any], strides: Sequence[int]) -> Reader:
    """Return what reads shards where they are; `strides` are the bytes of a sample in each."""
    if isinstance(paths[0], Path):
        return LocalReader(paths, strides)
    names = list(map(str, paths))
    return RemoteReader(paths[0].fs, [path.path for path in paths], names, strides)
