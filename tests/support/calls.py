"""Processes that die at a given call: every function of `os` that changes files is counted.

A process killed by a signal leaves exactly what the calls before it did, so dying inside a wrapper
around os.write and its like, at the n-th of them for every n, covers every moment.
"""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

KILLED = 137
# Killed at each of these.
CHANGING = (
    "write", "fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir", "utime",
    "truncate", "ftruncate",
)  # fmt: skip


class Calls:
    """Wraps the functions of `os` that change files below `root`, counts them, dies at one."""

    def __init__(self, root: Path, die_at: int | None = None, mode: str = "") -> None:
        self.root, self.die_at, self.mode = str(root), die_at, mode
        self.paths: dict[int, str] = {}  # of file descriptors
        self.log: list[tuple[str, ...]] = []

    def install(self) -> None:
        real_open, real_close, real_io = os.open, os.close, io.open

        def open(path: Any, *args: Any, **options: Any) -> int:
            fd = real_open(path, *args, **options)
            self.paths[fd] = self._path(path, options)
            return fd

        def close(fd: int) -> None:
            self.paths.pop(fd, None)
            real_close(fd)

        def open_file(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            opened = real_io(file, mode, *args, **options)
            if not isinstance(file, int):  # also of one to be read: its number may have been used
                self.paths[opened.fileno()] = os.fspath(file)
            return Appended(opened) if mode == "a" else opened

        os.open, os.close, io.open = open, close, open_file
        for name in CHANGING:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _path(self, path: Any, options: dict[str, Any]) -> str:
        """shutil.rmtree names what it removes relative to an open folder."""
        folder = self.paths.get(options.get("dir_fd") or -1, "")
        return os.path.join(folder, os.fspath(path))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            on_fd = name in ("write", "fsync")
            paths = [self._path(arg, options) for arg in args[:2] if isinstance(arg, str | Path)]
            touched = [self.paths.get(args[0], "")] if on_fd else paths
            there = name == "mkdir" and os.path.isdir(touched[0])
            if there or not any(path.startswith(self.root) for path in touched):
                return real(*args, **options)
            here = len(self.log) == self.die_at
            self.log.append((name, *(os.path.relpath(path, self.root) for path in touched)))
            if here and self.mode == "before":
                os._exit(KILLED)
            if here and self.mode == "half":
                real(args[0], memoryview(args[1])[: len(args[1]) // 2])
                os._exit(KILLED)
            try:
                return real(*args, **options)
            finally:
                if here and self.mode == "after":
                    os._exit(KILLED)

        return call


def telling(calls: Sequence[Sequence[str]]) -> set[int]:
    """Calls worth dying at: of writes in a row to one file, the first, the middle and the last.

    What the others leave behind differs from that in length alone, and a file of tensors has a
    write for each of hundreds.
    """
    found, start = set[int](), 0
    while start < len(calls):
        end = start
        while calls[start][0] == "write" and calls[end + 1 : end + 2] == [calls[start]]:
            end += 1
        found |= {start, (start + end) // 2, end}
        start = end + 1
    return found


class Appended:
    """A text file opened for appending, whose writes go through os.write at once."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, text: str) -> int:
        return os.write(self.file.fileno(), text.encode())

    def __enter__(self) -> Appended:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def forked(work: Callable[[], None], log: Path) -> int:
    """Run `work` in a child; its exit status, 1 for an exception. What it prints goes to `log`."""
    child = os.fork()
    if not child:
        os._exit(in_child(work, log))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(work: Callable[[], None], log: Path) -> int:
    """Run `work`, with what it prints in `log`; 0, or 1 for an exception."""
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    try:
        work()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        return 1
    return 0
