"""Bytes of remote shards: ranged reads, a batch at a time, tried again where the network fails."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from fsspec.asyn import AsyncFileSystem

from shared.errors import UserError, first_line
from shared.storage.errors import is_mistake, is_permanent, without_password
from train.data.local import Span

ATTEMPTS = 6
PAUSE = 0.5  # seconds before the second attempt; doubled from one to the next
TIMEOUT = 60.0  # seconds for all ranges of one call


class RemoteReader:
    """Reads shards on any fsspec file system; the ranges of a call go out together."""

    def __init__(self, fs: Any, paths: Sequence[str], names: Sequence[str], stride: int) -> None:
        self.fs, self.paths, self.names, self.stride = fs, paths, names, stride
        # Only asynchronous file systems can be told how long to wait.
        self._options = {"timeout": TIMEOUT} if isinstance(fs, AsyncFileSystem) else {}

    def begin(self, spans: Sequence[Span]) -> list[Span]:
        """Nothing can be had without waiting."""
        return list(spans)

    def finish(self, spans: Sequence[Span]) -> None:
        """Fetch and fill. Raises UserError after several attempts, or for what is not there."""
        for attempt in range(1, ATTEMPTS + 1):
            answers = self._ask(spans)
            failed = []
            for span, answer in zip(spans, answers, strict=True):
                if isinstance(answer, bytes) and len(answer) == span.nbytes:
                    span.put(answer)
                else:
                    failed.append((span, answer))
            if not failed:
                return
            self._check_final(failed, attempt)
            if attempt == 2:
                print(f"note: {self._complaint(*failed[0])}; trying again", file=sys.stderr)
            time.sleep(PAUSE * 2 ** (attempt - 1))
            spans = [span for span, _ in failed]

    def peek(self, spans: Sequence[Span]) -> None:
        """Fetch and fill, as `finish` does."""
        self.finish(spans)

    def _ask(self, spans: Sequence[Span]) -> list[Any]:
        """For each span its bytes, or the exception that came instead."""
        paths = [self.paths[span.shard] for span in spans]
        starts = [span.offset for span in spans]
        ends = [span.offset + span.nbytes for span in spans]
        try:
            return list(self.fs.cat_ranges(paths, starts, ends, on_error="return", **self._options))
        except Exception as error:  # a time-out of the whole call, or a broken connection
            if is_mistake(error):
                raise
            return [error] * len(spans)

    def _check_final(self, failed: Sequence[tuple[Span, Any]], attempt: int) -> None:
        """Raise UserError where trying again is of no use; a bug passes as it is."""
        for span, answer in failed:
            if isinstance(answer, Exception) and is_mistake(answer):
                raise answer
            if isinstance(answer, Exception) and is_permanent(answer):
                raise UserError(f"{self._complaint(span, answer)}; is the cache complete?")
        if attempt == ATTEMPTS:
            raise UserError(
                f"{self._complaint(*failed[0])}, in {ATTEMPTS} attempts; check the network and "
                "the shard, then resume"
            )

    def _complaint(self, span: Span, answer: Any) -> str:
        """Which sample cannot be read, and why."""
        if isinstance(answer, bytes):
            why = f"{len(answer)} bytes came where {span.nbytes} were asked for"
        else:
            why = first_line(answer)
        name = without_password(self.names[span.shard])
        return f"{name} sample {span.offset // self.stride}: {why}"

    def close(self) -> None:
        """Connections belong to fsspec."""
