"""Work done ahead by threads in a ring of slots, handed out in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Entry = TypeVar("Entry")
Result = TypeVar("Result")


class Ring(Generic[Entry, Result]):
    """Yields fill(start, entry), fill(start + 1, entry) and so on, without end.

    One entry is in use by the consumer, the others are being filled. An entry is filled again when
    the consumer asks for the next result. An exception comes where its result would have come.
    `waited` counts the seconds that the consumer has waited. Each thread calls `initializer` first.
    """

    def __init__(
        self,
        fill: Callable[[int, Entry], Result],
        entries: Sequence[Entry],
        threads: int,
        initializer: Callable[[], None] | None = None,
    ) -> None:
        assert len(entries) > 1
        self.fill, self.entries = fill, entries
        self.threads, self.initializer = threads, initializer
        self.waited = 0.0

    def run(self, start: int) -> Generator[Result, None, None]:
        """The stream from `start` on; closing it ends the threads."""
        waiting: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(self.threads, "loader", initializer=self.initializer) as pool:

            def submit(index: int) -> None:
                entry = self.entries[index % len(self.entries)]
                waiting.append(pool.submit(self.fill, index, entry))

            try:
                ahead = start + len(self.entries) - 1
                for index in range(start, ahead):
                    submit(index)
                while True:
                    asked = time.perf_counter()
                    result = waiting.popleft().result()
                    self.waited += time.perf_counter() - asked
                    # The entry of the result that was in use until now is free again.
                    submit(ahead)
                    ahead += 1
                    yield result
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
