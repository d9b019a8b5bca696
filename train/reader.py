"""Bytes of local shards into memory: what the page cache holds at once, the rest side by side.

`begin` and `finish` are two calls so that the disk works while the caller does something else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

from shared.errors import UserError

OPEN_FILES = 256
NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)  # Linux: read only what needs no disk


class Span(NamedTuple):
    """Bytes of one sample that lie together, and the memory that they fill in turn."""

    shard: int
    offset: int  # in the shard
    nbytes: int
    views: tuple[memoryview, ...]

    def put(self, data: bytes | memoryview) -> None:
        """Fill the views from `nbytes` bytes."""
        view, start = memoryview(data), 0
        for into in self.views:
            into[:] = view[start : start + len(into)]
            start += len(into)


class Reader(Protocol):
    """Reads spans of a bucket's shards; safe to use from several threads."""

    def begin(self, spans: Sequence[Span]) -> list[Span]:
        """Start reading without waiting; returns the spans that `finish` must still be given."""

    def finish(self, spans: Sequence[Span]) -> None:
        """Wait until these are filled. Raises UserError, naming the sample, where one cannot be."""

    def close(self) -> None:
        """Give files back; what is read afterwards opens them anew."""


class LocalReader:
    """Reads local shards with `preadv`; `remedy` ends the sentence where one is damaged."""

    def __init__(
        self,
        paths: Sequence[Path],
        stride: int,
        remedy: str = "`prep verify` lists the damage",
    ) -> None:
        self.paths, self.stride, self.remedy = paths, stride, remedy
        # A file closes itself when it has left this cache and no thread reads it any more.
        self._file = lru_cache(OPEN_FILES)(lambda shard: _File(self.paths[shard]))

    def begin(self, spans: Sequence[Span]) -> list[Span]:
        """Fill what lies in the page cache; ask the disk for everything else at once."""
        return [span for span in spans if not self._fill_from_page_cache(span)]

    def _fill_from_page_cache(self, span: Span) -> bool:
        try:
            file = self._file(span.shard)  # held, for else it might be closed while it is read
        except OSError:
            return False  # `finish` says so, and what is wrong
        if NOWAIT is None:
            return False
        with contextlib.suppress(OSError):  # not there, or no such reads in this file system
            if os.preadv(file.fd, span.views, span.offset, NOWAIT) == span.nbytes:
                return True
        os.posix_fadvise(file.fd, span.offset, span.nbytes, os.POSIX_FADV_WILLNEED)
        return False

    def finish(self, spans: Sequence[Span]) -> None:
        """Read, waiting for the disk."""
        for span in spans:
            try:
                file = self._file(span.shard)
                count = os.preadv(file.fd, span.views, span.offset)
            except OSError as error:
                name = self._name(span)
                raise UserError(
                    f"{name} cannot be read ({error.strerror}); {self.remedy}"
                ) from None
            if count != span.nbytes:
                raise UserError(f"{self._name(span)} is cut short; {self.remedy}")

    def _name(self, span: Span) -> str:
        return f"{self.paths[span.shard]} sample {span.offset // self.stride}"

    def close(self) -> None:
        """Close the files."""
        self._file.cache_clear()


class _File:
    """A file descriptor that is closed with its last user."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
