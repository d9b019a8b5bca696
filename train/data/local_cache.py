"""`--local-cache`: whole samples that were read from afar, kept on a local disk.

One file per shard, named by the shard's sha256: the shard's own bytes at their own places (sparse,
so only what was read takes room), then one byte per sample, 1 where the sample is whole. The bytes
are fsynced before their mark is written, so a crash at any moment leaves samples that are whole or
unmarked; processes may share the folder, since all of them write the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from shared.cache.units import Shard
from shared.errors import UserError
from shared.storage.files import free_bytes
from shared.wording import size_of
from train.data.local import OPEN_FILES, LocalReader, OpenFile, Span
from train.data.remote import RemoteReader

SYNCED_AFTER = 512  # samples kept before they are fsynced and marked
WHOLE = b"\1"


class LocalCache:
    """A folder of kept samples, shared by all buckets of a cache."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--local-cache {folder}: {error.strerror}; choose another") from None
        self.folder, self.full = folder, False
        self._file = lru_cache(OPEN_FILES)(lambda path: OpenFile(path, os.O_RDWR | os.O_CREAT))
        self._fresh: dict[tuple[Path, int], set[int]] = {}  # written, but not yet marked
        self._lock, self._syncing = threading.Lock(), threading.Lock()

    def path(self, shard: Shard) -> Path:
        """Return where a shard's samples are kept."""
        assert shard.sha256, shard
        return self.folder / f"{shard.sha256}.samples"

    def announce(self, shards: Sequence[Shard]) -> str:
        """Say how much room the cache's samples may take, in one line."""
        total = sum(shard.size for shard in shards)
        kept = 0
        for shard in shards:
            with contextlib.suppress(FileNotFoundError):
                kept += self.path(shard).stat().st_blocks * 512
        free = free_bytes(self.folder)
        return (
            f"local cache {self.folder}: up to {size_of(total)}, {size_of(kept)} of them "
            f"there, {size_of(free)} free"
        )

    def holds(self, shard: Shard, sample: int) -> bool:
        """Is the sample there, and whole?"""
        key = (self.path(shard), shard.size)
        if sample in self._fresh.get(key, ()):
            return True
        try:
            file = self._file(key[0])  # held, for else it might be closed while it is read
            return os.pread(file.fd, 1, shard.size + sample) == WHOLE
        except OSError as error:
            self._stop(error)
            return False

    def keep(self, shard: Shard, sample: int, data: bytearray) -> None:
        """Write a sample. A disk that takes no more ends the keeping, with one warning."""
        if self.full:
            return
        key = (self.path(shard), shard.size)
        try:
            file = self._file(key[0])
            _write(file.fd, data, sample * len(data))
        except OSError as error:
            self._stop(error)
            return
        with self._lock:
            self._fresh.setdefault(key, set()).add(sample)
            due = sum(map(len, self._fresh.values())) >= SYNCED_AFTER
        if due and not self._syncing.locked():
            self.sync()

    def sync(self) -> None:
        """Make what was kept outlast this process: fsync the bytes, then mark them whole."""
        with self._syncing:
            for key in list(self._fresh):
                with self._lock:
                    written = sorted(self._fresh[key])
                try:
                    file = self._file(key[0])
                    os.fdatasync(file.fd)
                    for sample in written:
                        _write(file.fd, WHOLE, key[1] + sample)
                except OSError as error:  # of bytes that could not be written nothing is known
                    self._stop(error)
                with self._lock:
                    self._fresh[key].difference_update(written)

    def _stop(self, error: OSError) -> None:
        with self._lock:
            told, self.full = self.full, True
        if not told:
            print(
                f"warning: --local-cache {self.folder}: {error.strerror}; what is not there yet is "
                "read from afar every time",
                file=sys.stderr,
            )


def _write(fd: int, data: bytes | bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


class KeepingReader:
    """Reads samples from a local cache, and from afar, whole and once, what is not there."""

    def __init__(
        self, remote: RemoteReader, local: LocalCache, shards: Sequence[Shard], stride: int
    ) -> None:
        self.remote, self.local, self.shards, self.stride = remote, local, shards, stride
        paths = [local.path(shard) for shard in shards]
        self._kept = LocalReader(paths, [stride] * len(paths), f"delete {local.folder} and resume")

    def start(self, spans: Sequence[Span]) -> list[Span]:
        """Fill what the local cache holds in memory."""
        here, elsewhere = self._split(spans)
        return self._kept.start(here) + elsewhere

    def finish(self, spans: Sequence[Span]) -> None:
        """Read the rest from the local cache or from afar."""
        here, elsewhere = self._split(spans)
        self._kept.finish(here)
        if self.local.full:
            self.remote.finish(elsewhere)
            return
        wanted = dict.fromkeys(self._position(span) for span in elsewhere)
        samples = {position: bytearray(self.stride) for position in wanted}
        self.remote.finish(
            [
                Span(shard, sample * self.stride, self.stride, (memoryview(data),))
                for (shard, sample), data in samples.items()
            ]
        )
        for (shard, sample), data in samples.items():
            self.local.keep(self.shards[shard], sample, data)
        for span in elsewhere:
            start = span.offset % self.stride
            whole = memoryview(samples[self._position(span)])
            span.put(whole[start : start + span.nbytes])

    def peek(self, spans: Sequence[Span]) -> None:
        """Read from afar, these bytes alone, and keep nothing."""
        self.remote.peek(spans)

    def _position(self, span: Span) -> tuple[int, int]:
        return span.shard, span.offset // self.stride

    def _split(self, spans: Sequence[Span]) -> tuple[list[Span], list[Span]]:
        """Return those that the local cache holds, and the others."""
        held = [self.local.holds(self.shards[s.shard], s.offset // self.stride) for s in spans]
        return (
            [span for span, here in zip(spans, held, strict=True) if here],
            [span for span, here in zip(spans, held, strict=True) if not here],
        )

    def close(self) -> None:
        """Mark what was kept, and close the files."""
        self.local.sync()
        self._kept.close()
