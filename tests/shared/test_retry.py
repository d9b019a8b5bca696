"""Trying again: what is worth it, how often, and with which waits."""

import pytest

from shared.errors import UserError
from shared.storage import retry
from shared.storage.retry import with_retries, worth_another_try


@pytest.fixture
def waits(monkeypatch):
    found = []
    monkeypatch.setattr(retry.time, "sleep", found.append)
    return found


def failing(error, calls):
    def act():
        calls.append(error)
        raise error

    return act


def test_waits_double_and_are_not_the_same_for_all(waits):
    calls, told = [], []
    with pytest.raises(TimeoutError):
        with_retries(failing(TimeoutError("slow"), calls), failed=told.append)
    assert len(calls) == retry.TRIES
    assert told == list(range(1, retry.TRIES))
    least = [retry.FIRST_WAIT * 2**number for number in range(retry.TRIES - 1)]
    assert all(
        low <= wait <= low + retry.FIRST_WAIT for low, wait in zip(least, waits, strict=True)
    )
    assert len({wait - low for low, wait in zip(least, waits, strict=True)}) > 1


def test_what_succeeds_later_is_returned(waits):
    answers = [OSError("broken"), TimeoutError("slow"), "bytes"]

    def act():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert with_retries(act) == "bytes"
    assert len(waits) == 2


def sent_away():
    error = FileNotFoundError("http://a/b")
    error.__cause__ = PermissionError("it redirects elsewhere")
    return error


@pytest.mark.parametrize(
    "error",
    [UserError("told"), FileExistsError("there"), PermissionError("no"), FileNotFoundError("gone"),
     TypeError("ours"), sent_away()],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_no_other_try_will_mend_is_raised_at_once(waits, error):
    calls = []
    with pytest.raises(type(error)):
        with_retries(failing(error, calls))
    assert (len(calls), waits) == (1, [])
    assert not worth_another_try(error)
