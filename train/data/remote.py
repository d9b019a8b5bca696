"""Bytes of remote shards: ranged reads, a batch at a time, tried again where the network fails."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from fsspec.asyn import AsyncFileSystem

from shared.errors import UserError, first_line
from shared.storage.errors import is_mistake, without_password
from shared.storage.retry import TRIES, with_retries, worth_another_try
from train.data.local import Span

TIMEOUT = 60.0  # seconds for all ranges of one call


class RemoteReader:
    """Reads shards on any fsspec file system; the ranges of a call go out together."""

    def __init__(
        self, fs: Any, paths: Sequence[str], names: Sequence[str], strides: Sequence[int]
    ) -> None:
        self.fs, self.paths, self.names, self.strides = fs, paths, names, strides
        # Only asynchronous file systems can be told how long to wait.
        self._options = {"timeout": TIMEOUT} if isinstance(fs, AsyncFileSystem) else {}

    def start(self, spans: Sequence[Span]) -> list[Span]:
        """Return all: nothing can be had without waiting."""
        return list(spans)

    def finish(self, spans: Sequence[Span]) -> None:
        """Fetch and fill. Raises UserError after several attempts, or for what is not there."""
        failed = [(span, Exception()) for span in spans]

        def fetch() -> None:
            failed[:] = self._fetch([span for span, _ in failed])
            if failed:
                raise failed[0][1]

        def note(number: int) -> None:
            if number == 2:
                print(f"note: {self._complaint(*failed[0])}; trying again", file=sys.stderr)

        try:
            with_retries(fetch, failed=note)
        except Exception as error:
            if is_mistake(error):
                raise
            why = self._complaint(failed[0][0], error)
            if not worth_another_try(error):
                raise UserError(f"{why}; is the cache complete?") from None
            raise UserError(
                f"{why}, in {TRIES} attempts; check the network and the shard, then resume"
            ) from None

    def peek(self, spans: Sequence[Span]) -> None:
        """Fetch and fill, as `finish` does."""
        self.finish(spans)

    def _fetch(self, spans: Sequence[Span]) -> list[tuple[Span, Exception]]:
        """Fill what comes; returns what does not, and why, what no other try will mend first."""
        failed = []
        for span, answer in zip(spans, self._ask(spans), strict=True):
            if isinstance(answer, Exception):
                failed.append((span, answer))
            elif len(answer) == span.nbytes:
                span.put(answer)
            else:
                why = f"{len(answer)} bytes came where {span.nbytes} were asked for"
                failed.append((span, OSError(why)))
        return sorted(failed, key=lambda pair: worth_another_try(pair[1]))

    def _ask(self, spans: Sequence[Span]) -> list[bytes | Exception]:
        """Return each span's bytes, or the exception that came instead."""
        paths = [self.paths[span.shard] for span in spans]
        starts = [span.offset for span in spans]
        ends = [span.offset + span.nbytes for span in spans]
        try:
            return list(self.fs.cat_ranges(paths, starts, ends, on_error="return", **self._options))
        except Exception as error:  # a time-out of the whole call, or a broken connection
            if is_mistake(error):
                raise
            return [error] * len(spans)

    def _complaint(self, span: Span, error: Exception) -> str:
        """Say which sample cannot be read, and why."""
        name = without_password(self.names[span.shard])
        return f"{name} sample {span.offset // self.strides[span.shard]}: {first_line(error)}"

    def close(self) -> None:
        """Connections belong to fsspec."""
