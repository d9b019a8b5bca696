"""Work in a thread of its own, whose steps are told while it goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

from infer.page.work.turns import Turn

T = TypeVar("T")

Step = tuple[int, int]  # done, of how many
OnStep = Callable[[int, int], object]


def following(work: Callable[[OnStep], T], turn: Turn) -> Generator[Step, None, T]:
    """Yield the steps of `work` as they are done, the latest of several; return what it returns.

    Raises what it raises, and Cancelled after the step in which the turn was cancelled. Who stops
    listening cancels it, too.
    """
    steps = queue.Queue[Step | None]()
    results, errors = list[T](), list[BaseException]()

    def on_step(done: int, total: int) -> None:
        steps.put((done, total))
        turn.check()

    def run() -> None:
        try:
            results.append(work(on_step))
        except BaseException as error:
            errors.append(error)
        finally:
            steps.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (step := latest(steps)) is not None:
            yield step
    except GeneratorExit:
        turn.cancel()
        raise
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def latest(steps: queue.Queue[Step | None]) -> Step | None:
    """Wait for a step; of several that have come, the last. None when there are no more."""
    step = steps.get()
    while step is not None and not steps.empty():
        step = steps.get()
    return step
