"""Work whose steps are told: it ends as it ends, or when nobody wants it."""

import threading
import time

import pytest

from infer.page.work.following import following
from infer.page.work.turns import Cancelled, Turn


def counting(on_step):
    """Four steps, and what comes of them."""
    for number in range(1, 5):
        on_step(number, 4)
        time.sleep(0.01)
    return "done"


def told(steps):
    """All steps that are told, and the result."""
    found = []
    while True:
        try:
            found.append(next(steps))
        except StopIteration as end:
            return found, end.value


def test_steps_are_told_and_the_result_comes_back():
    found, result = told(following(counting, Turn()))
    assert result == "done"
    assert found[0] == (1, 4)
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
