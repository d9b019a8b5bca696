"""The user's mistakes, told in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake or bad data that the user can mend: one line with cause and remedy."""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's `main`; a UserError or Ctrl-C ends it in one line, without a traceback.

    Exits 0 on success, 1 on a UserError, 130 on Ctrl-C.
    """
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
        sys.exit(130)
    except BrokenPipeError:  # `python -m prep stats | head`
        sys.stderr.close()
        sys.exit(141)
