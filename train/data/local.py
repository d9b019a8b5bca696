"""Bytes of local shards into memory: what the page cache holds at once, the rest side by side.

`start` and `finish` are two calls so that the disk works while the caller does something else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from shared.errors import UserError

OPEN_FILES = 256
NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)  # Linux: read only what needs no disk


class Span(NamedTuple):
    """Bytes of one sample that lie together, and the memory that they fill in turn."""

    shard: int
    offset: int  # in the shard
    nbytes: int
    views: tuple[memoryview, ...]

    def put(self, data: bytes | bytearray | memoryview) -> None:
        """Fill the views from `nbytes` bytes."""
        view, start = memoryview(data), 0
        for into in self.views:
            into[:] = view[start : start + len(into)]
            start += len(into)


class LocalReader:
    """Reads local shards with `preadv`; `remedy` ends the sentence where one is damaged.

    `strides` are the bytes of a sample in each shard.

    Like the other readers it is safe to use from several threads.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        strides: Sequence[int],
        remedy: str = "`prep verify` lists the damage",
    ) -> None:
        self.paths, self.strides, self.remedy = paths, strides, remedy
        # A file closes itself when it has left this cache and no thread reads it any more.
        self._file = lru_cache(OPEN_FILES)(lambda shard: OpenFile(self.paths[shard], os.O_RDONLY))

    def start(self, spans: Sequence[Span]) -> list[Span]:
        """Fill what lies in the page cache; ask the disk at once for the rest, and return that."""
        rest = list(spans) if NOWAIT is None else self._fill_from_page_cache(spans, NOWAIT)
        if hasattr(os, "posix_fadvise"):
            for span in rest:
                with contextlib.suppress(OSError):  # `finish` says what is wrong
                    file = self._file(span.shard)
                    os.posix_fadvise(file.fd, span.offset, span.nbytes, os.POSIX_FADV_WILLNEED)
        return rest

    def _fill_from_page_cache(self, spans: Sequence[Span], flags: int) -> list[Span]:
        """Returns what was not all there."""
        rest = []
        for span in spans:
            try:
                # `file` is held, for else another thread's opening might close it meanwhile.
                file = self._file(span.shard)
                if os.preadv(file.fd, span.views, span.offset, flags) == span.nbytes:
                    continue
            except OSError:  # nothing is there, or the file system knows no such reads
                pass
            rest.append(span)
        return rest

    def finish(self, spans: Sequence[Span]) -> None:
        """Read, waiting for the disk. Raises UserError, naming the sample, where it cannot."""
        for span in spans:
            try:
                file = self._file(span.shard)
                count = os.preadv(file.fd, span.views, span.offset)
            except FileNotFoundError:
                raise UserError(
                    f"{self.paths[span.shard]} was removed after the cache was opened; run the "
                    "same command again, which opens the cache as it is now"
                ) from None
            except OSError as error:
                name = self._name(span)
                raise UserError(
                    f"{name} cannot be read ({error.strerror}); {self.remedy}"
                ) from None
            if count != span.nbytes:
                raise UserError(f"{self._name(span)} is cut short; {self.remedy}")

    def peek(self, spans: Sequence[Span]) -> None:
        """Read, the page cache first."""
        self.finish(self.start(spans))

    def _name(self, span: Span) -> str:
        return f"{self.paths[span.shard]} sample {span.offset // self.strides[span.shard]}"

    def close(self) -> None:
        """Close the files; what is read afterwards opens them anew."""
        self._file.cache_clear()


class OpenFile:
    """A file descriptor that is closed with its last user."""

    def __init__(self, path: Path, flags: int) -> None:
        self.fd = -1
        self.fd = os.open(path, flags, 0o644)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
