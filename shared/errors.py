"""The user's mistakes, told in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from shared.sanitize import on_one_line

# What to do where the operating system refuses.
REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "permission denied; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EEXIST: "it is a file, where a folder belongs; choose another path",
    errno.ENOTDIR: "part of the path is a file, not a folder; choose another path",
    errno.ELOOP: "its links go round in a circle; mend them",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter path",
    errno.EFBIG: "the file system takes no file of that size; choose another folder",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n) or use fewer threads",
    errno.ENFILE: "the machine has too many files open; end what opens them",
    errno.ENOMEM: "the memory is full; free some of it",
}
# What is no refusal of this folder, but trouble of the machine's.
TROUBLE = {
    errno.EIO: "the disk fails (input/output error); look into the system's log",
    errno.ESTALE: "the file server has lost it (stale handle); run the same command again",
}
# How torch, and what it is built on, say that the machine's memory is full.
NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory")
NO_THREADS = "can't start new thread"


class UserError(Exception):
    """A mistake or bad data that the user can mend: one line with cause and remedy."""

    status = 1


class UsageError(UserError):
    """A command line, or a file of settings, that cannot be understood."""

    status = 2


GOES_ON = "what was committed is safe; the same command goes on from there"


def run_main(
    main: Callable[[], int | None], less_memory: str = "", interrupted: str = GOES_ON
) -> None:
    """Run a command's `main`; a UserError, Ctrl-C or SIGTERM ends it in one line.

    So does what the operating system refuses, and memory that is full, the GPU's or the machine's:
    `less_memory` says which flags need less of it, `interrupted` what is there after an
    interruption. Exits 0 on success, 1 on an error, 2 on a wrong command line, 130 on Ctrl-C and
    143 on SIGTERM.
    """
    speak_any_name()
    signals: list[int] = []
    try:
        with _interruptible(signals):
            status = main() or 0
            sys.stdout.flush()  # here a full disk is still an error of ours
        sys.exit(status)
    except UserError as error:
        _fail(str(error), error.status)
    except (RuntimeError, MemoryError) as error:
        what = exhausted(error)
        if not what and signals:
            _interrupted(signals, interrupted)
        if not what:
            raise
        _fail(f"{what}; {less_memory}" if less_memory else f"{what}; close other programs")
    except KeyboardInterrupt:
        _interrupted(signals, interrupted)
    except BrokenPipeError:  # `python -m prep stats | head`
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        _drop_unwritten()
        _fail(system_error(error))
    except Exception:
        if not signals:
            raise
        # Of which a library's C code has made an error of its own.
        _interrupted(signals, interrupted)


def _interrupted(signals: Sequence[int], said: str) -> NoReturn:
    """Say that these signals ended the command, and exit as shells expect it."""
    print(f"interrupted: {said}", file=sys.stderr)
    sys.exit(143 if signal.SIGTERM in signals else 130)


def speak_any_name() -> None:
    """Let names that are not UTF-8, or not what the terminal can show, be printed spelled out."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _fail(message: str, status: int = 1) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody can be told
        print(f"error: {on_one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(status)


def _drop_unwritten() -> None:
    """Forget what stdout could not be given, or Python would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):  # no real stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def system_error(error: OSError) -> str:
    """Return an error of the operating system in a line: which file, what is wrong, what to do."""
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    remedies = REMEDIES | TROUBLE
    if not isinstance(error.errno, int) or error.errno not in remedies:
        return f"{where}{error.strerror or first_line(error)}"
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = "what was to be written does not fit: "
    return f"{where}{remedies[error.errno]}"


def unreadable(error: OSError) -> str:
    """Return why a file cannot be read, and what to do about it."""
    why = error.strerror or first_line(error)
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOTDIR, *TROUBLE):
        return f"({why}): {(REMEDIES | TROUBLE)[error.errno]}"
    denied = error.errno in (errno.EACCES, errno.EPERM)
    return f"({why}); {'make it readable for you' if denied else 'restore it'}"


def exhausted(error: BaseException) -> str:
    """Return which memory is full, or an empty string where the error says nothing of the kind."""
    if isinstance(error, MemoryError):
        return "the memory is full"
    torch = sys.modules.get("torch")  # which takes a while to load
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full"
    text = str(error)
    if any(words in text for words in NO_MEMORY):
        return "the memory is full"
    return "the system allows no more threads (ulimit -u)" if NO_THREADS in text else ""


def words_of(error: BaseException, longest: int = 300) -> str:
    """Return what an error says, on one line, or its kind where it says nothing."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _interruptible(signals: list[int]) -> Iterator[None]:
    """Ctrl-C and SIGTERM are noted and raise KeyboardInterrupt (Ray swallows what it knows not).

    A process that is forked from this one dies of SIGTERM as usual.
    """
    if threading.current_thread() is not threading.main_thread():  # only there may signals be set
        yield
        return
    owner = os.getpid()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see shared/cli/startup.py
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(number: int, _: object) -> None:
        if os.getpid() != owner and number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        signals.append(number)
        raise KeyboardInterrupt

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
