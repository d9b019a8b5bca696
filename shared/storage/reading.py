"""Small files read whole, where what is no file, or may not be read, ends in one line."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shared.errors import UserError, unreadable
from shared.storage.urls import Place


class NotAFile(UserError):
    """A folder, a pipe or a device stands where a file should."""


def read_file(path: Place) -> bytes:
    """Read a file. Raises UserError, naming it, where it is missing or cannot be read."""
    content = read_if_there(path)
    if content is None:
        raise UserError(f"{path} does not exist")
    return content


def read_if_there(path: Place) -> bytes | None:
    """Read a file; None where there is none.

    Raises UserError for what is no file (a pipe would be waited for), or may not be read.
    """
    try:
        if not isinstance(path, Path):
            return path.read_bytes()
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Yield a local file's bytes. Raises UserError for what is no file or may not be read.

    FileNotFoundError where there is nothing.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # which waits for no pipe
        with os.fdopen(fd, "rb") as file:
            kind = os.fstat(fd).st_mode
            if not stat.S_ISREG(kind):
                raise NotAFile(f"{path} is {kind_of(kind)}, no file; move it away")
            yield file
    except FileNotFoundError:
        raise
    except IsADirectoryError:  # Python does not open a folder's descriptor
        raise NotAFile(f"{path} is a folder, no file; move it away") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read {unreadable(error)}") from None


def kind_of(mode: int) -> str:
    """Return what `st_mode` says that something is, which is no file."""
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a named pipe" if stat.S_ISFIFO(mode) else "a device or socket"
