"""Where a tar's bytes come from: a local file or a shell command, compressed or not."""

from __future__ import annotations

import atexit
import gzip
import io
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, ClassVar, cast

import zstandard

from prep.rows.row import SourceError
from shared.sanitize import printable

PATIENCE = 5.0  # seconds that a command has to end when it is asked to
ZSTD, GZIP = b"\x28\xb5\x2f\xfd", b"\x1f\x8b"


@dataclass(frozen=True)
class LocalFile:
    """A file by its path."""

    path: str
    remedy: ClassVar[str] = "download it again"  # where the bytes are not what they should be

    @property
    def source(self) -> str:
        """The path as text."""
        return printable(self.path)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Yield the file."""
        with open(self.path, "rb") as file:
            yield file


@dataclass(frozen=True)
class Command:
    """A shell command that writes a tar to its standard output."""

    command: str
    remedy: ClassVar[str] = "try the command by hand"

    @property
    def source(self) -> str:
        """As in --shards."""
        return f"pipe:{printable(self.command)}"

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Yield its output. Whoever reads to the end gets SourceError if the command failed."""
        process = subprocess.Popen(
            self.command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        # Should this process end while a thread still waits for the command to say something.
        end = atexit.register(partial(_end, process))
        try:
            with io.BufferedReader(_Output(self, process), 1 << 16) as file:
                yield file
        finally:
            atexit.unregister(end)
            assert process.stdout is not None
            process.stdout.close()
            if process.poll() is None:  # nobody wants the rest
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the command and its children to end; make them if they do not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(timeout=PATIENCE)


class _Output(io.RawIOBase):
    """A command's standard output, whose end counts only if the command succeeded."""

    def __init__(self, command: Command, process: subprocess.Popen[bytes]) -> None:
        super().__init__()
        self.command, self.process = command, process

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        assert self.process.stdout is not None
        count = cast(io.BufferedReader, self.process.stdout).readinto1(buffer)  # type: ignore[arg-type]
        if count == 0 and (status := self.process.wait()) != 0:
            how = f"exit status {status}" if status > 0 else f"signal {-status}"
            raise SourceError(
                f"{self.command.source}: the command failed ({how}); {self.command.remedy}"
            )
        return count


@contextmanager
def decompressed(file: BinaryIO) -> Iterator[BinaryIO]:
    """Yield the content of `file`, which may be plain, zstd or gzip: its first bytes tell."""
    head = cast(io.BufferedReader, file).peek(4)[:4]
    if head == ZSTD:
        with zstandard.ZstdDecompressor().stream_reader(
            file, read_across_frames=True, closefd=False
        ) as reader:
            yield cast(BinaryIO, reader)
    elif head[:2] == GZIP:
        with gzip.GzipFile(fileobj=file, mode="rb") as unzipped:
            yield cast(BinaryIO, unzipped)
    else:
        yield file
