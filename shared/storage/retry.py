"""One way of trying again what a network, or a server behind it, failed at."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from shared.errors import UserError
from shared.storage.errors import is_mistake, is_permanent

T = TypeVar("T")

TRIES = 6
FIRST_WAIT = 0.5  # seconds; doubled after each failure, and up to as much added by chance
LONGEST_WAIT = 60.0  # seconds


def worth_another_try(error: BaseException) -> bool:
    """Might the same call succeed later? Not where it is refused, or a mistake of the program."""
    return isinstance(error, Exception) and not (
        isinstance(error, UserError | FileExistsError) or is_mistake(error) or is_permanent(error)
    )


def with_retries(
    act: Callable[[], T], tries: int = TRIES, failed: Callable[[int], None] | None = None
) -> T:
    """Call `act` up to `tries` times, with ever longer waits in between; return what it returns.

    `failed` is told the number of each failure (1, 2, ...) that another try follows. Raises what
    the last call raised.
    """
    retrying = Retrying(
        stop=stop_after_attempt(tries),
        wait=wait_exponential(FIRST_WAIT, LONGEST_WAIT) + wait_random(0, FIRST_WAIT),
        retry=retry_if_exception(worth_another_try),
        before_sleep=failed and (lambda state: failed(state.attempt_number)),
        sleep=time.sleep,
        reraise=True,
    )
    return retrying(act)
