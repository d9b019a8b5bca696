"""The user's mistakes, told in one line."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable


class UserError(Exception):
    """A mistake or bad data that the user can mend: one line with cause and remedy."""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's `main`; a UserError, Ctrl-C or SIGTERM ends it in one line.

    Exits 0 on success, 1 on a UserError, 130 on Ctrl-C, 143 on SIGTERM.
    """
    terminated: list[bool] = []  # not an exception of its own, which Ray would swallow

    def terminate(*_: object) -> None:
        terminated.append(True)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # only there may signals be set
        signal.signal(signal.SIGTERM, terminate)
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(
            "interrupted: what was committed is safe; the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(143 if terminated else 130)
    except BrokenPipeError:  # `python -m prep stats | head`
        sys.stderr.close()
        sys.exit(141)
