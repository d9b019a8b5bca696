"""The user's mistakes, told in one line."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake or bad data that the user can mend: one line with cause and remedy."""


def run_main(main: Callable[[], int | None], less_memory: str = "") -> None:
    """Run a command's `main`; a UserError, Ctrl-C or SIGTERM ends it in one line.

    So does a GPU whose memory is full: `less_memory` says which flags need less of it. Exits 0 on
    success, 1 on an error, 130 on Ctrl-C, 143 on SIGTERM.
    """
    terminated: list[bool] = []
    try:
        with _terminable(terminated):
            sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {on_one_line(str(error))}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: the GPU's memory is full; {less_memory}", file=sys.stderr)
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


def is_out_of_memory(error: RuntimeError) -> bool:
    """Is it torch's error for a full GPU? Without torch, which takes a while to load, it is not."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def on_one_line(text: str) -> str:
    """`text` with line ends, control characters and lone surrogates, as names have, spelled out."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _terminable(terminated: list[bool]) -> Iterator[None]:
    """SIGTERM is noted and raises KeyboardInterrupt (Ray swallows exceptions it does not know).

    A process that is forked from this one dies of it as usual.
    """
    if threading.current_thread() is not threading.main_thread():  # only there may signals be set
        yield
        return
    owner = os.getpid()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see shared/startup.py
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def terminate(*_: object) -> None:
        if os.getpid() == owner:
            terminated.append(True)
            raise KeyboardInterrupt
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
