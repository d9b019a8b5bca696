"""Work done ahead by threads in a ring of slots, handed out in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Place = TypeVar("Place")
Result = TypeVar("Result")


class Ring(Generic[Place, Result]):
    """Yields fill(start, place), fill(start + 1, place) and so on, without end.

    One place is in use by the consumer, the others are being filled. A place is filled again when
    the consumer asks for the next result. An exception comes where its result would have come.
    `waited` counts the seconds that the consumer has waited. Each thread calls `begin` first.
    """

    def __init__(
        self,
        fill: Callable[[int, Place], Result],
        places: Sequence[Place],
        threads: int,
        begin: Callable[[], None] | None = None,
    ) -> None:
        assert len(places) > 1
        self.fill, self.places, self.threads, self.begin = fill, places, threads, begin
        self.waited = 0.0

    def run(self, start: int) -> Generator[Result, None, None]:
        """The stream from `start` on; closing it ends the threads."""
        waiting: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(self.threads, "loader", initializer=self.begin) as pool:

            def submit(index: int) -> None:
                place = self.places[index % len(self.places)]
                waiting.append(pool.submit(self.fill, index, place))

            try:
                ahead = start + len(self.places) - 1
                for index in range(start, ahead):
                    submit(index)
                while True:
                    began = time.perf_counter()
                    result = waiting.popleft().result()
                    self.waited += time.perf_counter() - began
                    # The place of the result that was in use until now is free again.
                    submit(ahead)
                    ahead += 1
                    yield result
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
