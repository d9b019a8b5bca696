"""What waits on the disk, or in a few bytes of memory, until a unit can be sorted by key."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.cache.layout import TRAILER, Layout
from shared.cache.paths import CachePaths
from shared.cache.sums import ChannelSums
from shared.cache.units import Shard
from shared.storage.files import guard, move, staged, write_all
from shared.storage.temporary import temporary
from shared.storage.urls import Place


def order_of(keys: array[int]) -> NDArray[np.int64]:
    """Where the keys stand that are the first, the second, ... when sorted."""
    return np.argsort(np.asarray(keys), kind="stable")


class Sums:
    """The samples' channel sums, kept one by one until all are there.

    They are added in the order of the keys: rounding must not tell in which order samples came.
    """

    def __init__(self) -> None:
        self.keys = array("Q")
        self.count = 0
        self.values = array("d")  # total and squares of each sample's channels

    def add(self, key: str, sums: ChannelSums) -> None:
        """Append a sample's sums."""
        self.keys.append(int(key, 16))
        self.count += sums.count
        self.values.extend(sums.total + sums.squares)

    def added(self) -> ChannelSums | None:
        """Add up all samples; None where there are none."""
        if not self.keys:
            return None
        values = np.asarray(self.values).reshape(len(self.keys), -1)[order_of(self.keys)]
        whole = values[0]
        for row in values[1:]:  # one after the other: np.sum may pair them
            whole = whole + row
        total, squares = np.split(whole, 2)
        return ChannelSums(self.count, tuple(total.tolist()), tuple(squares.tolist()))


class Spool:
    """Samples of one latent size in the order they were encoded, on disk.

    The file is open only while it is written or read: a unit may have a thousand sizes.
    """

    def __init__(self, layout: Layout, tmp: Path) -> None:
        self.layout = layout
        self.keys = array("Q")
        self.unwritten: list[bytes] = []
        self.held = ExitStack()
        with guard(tmp):
            self.path = self.held.enter_context(temporary(tmp, "-spool"))

    def add(self, key: str, record: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> int:
        """Append one sample; `write` brings it to the disk. Returns the checksum of its arrays."""
        crc32 = self.layout.crc32(arrays)
        self.unwritten.append(self.layout.pack(key, record | {"crc32": crc32}, arrays))
        self.keys.append(int(key, 16))
        return crc32

    def write(self) -> None:
        """Write what was added: many at once, for each call waits for Python's lock again."""
        if self.unwritten:
            with guard(self.path.parent), self.path.open("ab", buffering=0) as file:
                write_all(file.fileno(), b"".join(self.unwritten))
            self.unwritten.clear()

    def sorted_samples(self) -> Iterator[bytes]:
        """Yield the samples' bytes sorted by key, then the end of the tar."""
        stride = self.layout.stride
        with self.path.open("rb", buffering=0) as file:
            for index in order_of(self.keys).tolist():
                yield os.pread(file.fileno(), stride, index * stride)
        yield TRAILER

    def publish(self, cache: CachePaths, unit: str) -> Shard:
        """Write the shard under the name that its content gives it."""
        name, digest = self.write_shard(cache.shards, cache.tmp, unit)
        count = len(self.keys)
        return Shard(
            f"shards/{name}", self.layout, count, self.layout.shard_bytes(count), digest,
            f"{min(self.keys):016x}",
        )  # fmt: skip

    def write_shard(self, folder: Place, tmp: Path, unit: str) -> tuple[str, str]:
        """Write it into a folder, by way of `tmp`; returns its name there and its sha256."""
        height, width = self.layout.latent_size
        with staged(self.sorted_samples(), tmp) as (file, digest):
            name = f"{unit}-{height}x{width}-{digest[:12]}.tar"
            move(file, folder / name)
        return name, digest

    def close(self) -> None:
        """Delete the spool."""
        self.held.close()
