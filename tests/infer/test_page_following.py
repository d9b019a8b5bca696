"""Work whose steps are told: it ends as it ends, or when nobody wants it."""

import threading
import time

import pytest

from infer.page.work.following import following
from infer.page.work.turns import Cancelled, Turn


def told(steps, hear=lambda: None):
    """All steps that are told, `hear` after each, and the result."""
    found = []
    while True:
        try:
            found.append(next(steps))
        except StopIteration as end:
            return found, end.value
        hear()


def test_steps_are_told_and_the_result_comes_back():
    heard = threading.Semaphore(0)

    def counting(on_step):
        for number in range(1, 5):
            on_step(number, 4)
            assert heard.acquire(timeout=60)  # or the next step would take its place
        return "done"

    found, result = told(following(counting, Turn()), heard.release)
    assert result == "done"
    assert found == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_of_steps_that_come_together_the_last_is_told():
    found, result = told(following(lambda on_step: [on_step(n, 3) for n in (1, 2, 3)], Turn()))
    assert result == [None] * 3
    assert len(found) <= 3
    assert found == sorted(found)


def test_an_error_comes_through():
    def failing(on_step):
        on_step(1, 2)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        told(following(failing, Turn()))


def test_it_ends_after_the_step_in_which_it_was_cancelled():
    turn, done = Turn(), []

    def work(on_step):
        for number in range(1, 100):
            done.append(number)
            if number == 3:
                turn.cancel()
            on_step(number, 100)

    with pytest.raises(Cancelled):
        told(following(work, turn))
    assert done == [1, 2, 3]


def test_who_stops_listening_cancels_it():
    ended = threading.Event()

    def work(on_step):
        try:
            while True:
                on_step(1, 2)
                time.sleep(0.01)
        finally:
            ended.set()

    steps = following(work, Turn())
    next(steps)
    steps.close()
    assert ended.wait(10)
