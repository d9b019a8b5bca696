"""Stages of the pipeline that run at the same time, each a bounded number of items ahead."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from queue import Full, Queue
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

POLL_SECONDS = 0.1  # how soon a waiting reader notices that nobody wants the rest
PATIENCE = 5.0  # seconds that an unwanted reader has to end


def map_ahead(
    function: Callable[[S], T], items: Iterable[S], workers: int, ahead: int, name: str,
    weigh: Callable[[S], int] = lambda _: 0, most: int = 0,
    start: Callable[[], None] | None = None,
) -> Generator[T, None, None]:  # fmt: skip
    """Yield `function` of each item, in order, from `workers` threads; at most `ahead` items wait.

    Those that wait weigh at most `most` together: when they weigh more, no further item is taken
    before some are done. Each thread calls `start` first. What the function or the items raise is
    raised here, once. When the consumer stops early, what has started is waited for, and the rest
    is not started.
    """
    with ThreadPoolExecutor(workers, name, initializer=start) as pool:
        waiting: deque[tuple[Future[T], int]] = deque()
        weight = 0
        try:
            for item in items:
                waiting.append((pool.submit(function, item), weigh(item)))
                weight += waiting[-1][1]
                del item  # it may be large, and the next one is waited for
                while len(waiting) >= ahead or weight > most:
                    future, its = waiting.popleft()
                    weight -= its
                    yield future.result()
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def prefetch(items: Generator[T, None, None], ahead: int) -> Generator[T, None, None]:
    """Yield the items, taken in a thread of their own, at most `ahead` of them waiting.

    What they raise is raised here, once. When the consumer stops early they are closed in their
    thread; one that hangs, such as a command that says nothing, is left behind after `PATIENCE`.
    """
    handed: Queue[T | _End] = Queue(ahead)
    unwanted = threading.Event()

    def hand(item: T | _End) -> None:
        while not unwanted.is_set():
            try:
                return handed.put(item, timeout=POLL_SECONDS)
            except Full:
                pass

    def read() -> None:
        end = _End()
        try:
            with closing(items):
                for item in items:
                    hand(item)
                    if unwanted.is_set():
                        break
        except BaseException as error:
            end = _End(error)
        hand(end)

    reader = threading.Thread(target=read, name="read", daemon=True)
    reader.start()
    try:
        while not isinstance(item := handed.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        unwanted.set()
        reader.join(PATIENCE)


class _End:
    """Stands behind the last item, with what went wrong, if anything did."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def chunks(items: Iterable[T], size: int) -> Generator[list[T], None, None]:
    """Yield lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
