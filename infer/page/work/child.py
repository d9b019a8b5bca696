"""`python -m infer COMMAND` in a process of its own: its memory is free when it ends.

Its settings go through a file, so that no word of a user's can be taken for a flag.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import infer
from infer.page.work.turns import Cancelled, Turn
from shared.errors import UserError

ROOT = Path(infer.__file__).resolve().parents[1]  # where the packages are, installed or not
LOOK = 0.2  # seconds between two looks at what was said
PATIENCE = 20.0  # for a process to end that was asked to
ERROR = "error: "


class Child:
    """A command under way; `lines` tells what it says, `output` is what it printed."""

    def __init__(self, command: str, settings: Mapping[str, Any], file: Path) -> None:
        file.write_text(json.dumps(settings))
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "infer", command, "--config", str(file)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,  # Ctrl-C comes from here alone
        )  # fmt: skip
        self._said = queue.Queue[str]()
        self._output = list[str]()
        assert self._process.stderr is not None
        assert self._process.stdout is not None
        self._threads = [
            reading(self._process.stderr, self._said.put),
            reading(self._process.stdout, self._output.append),
        ]

    @property
    def output(self) -> str:
        """The last line of what was printed."""
        return self._output[-1] if self._output else ""

    def interrupt(self) -> None:
        """Ask it to end, as Ctrl-C does."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def lines(self, turn: Turn) -> Iterator[str]:
        """Each line that it says, until it ends.

        Raises Cancelled where the turn was, and UserError for what the command refused.
        """
        last = ""
        turn.when_cancelled(self.interrupt)
        try:
            while self._process.poll() is None or not self._said.empty():
                try:
                    last = self._said.get(timeout=LOOK)
                except queue.Empty:
                    continue
                if not last.startswith(ERROR):
                    yield last
            self._join()
        finally:
            self._end()
        if turn.cancelled:
            raise Cancelled
        if self._process.returncode:
            raise UserError(last.removeprefix(ERROR) or "it ended without a word")

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)

    def _end(self) -> None:
        self.interrupt()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def reading(stream: IO[str], take: Any) -> threading.Thread:
    """Let a thread take a stream's lines."""

    def read() -> None:
        with stream:
            for line in stream:
                if line.strip():
                    take(line.strip())

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread
