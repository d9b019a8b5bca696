"""Who is at work, so that Cancel, or a tab that is closed, ends it between two steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Cancelled(Exception):
    """The user wants no more of it."""


class Turn:
    """A piece of work of one session."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        self._told = list[Callable[[], object]]()

    def cancel(self) -> None:
        """Let the next `check` end the work."""
        self._cancelled.set()
        for tell in self._told:
            tell()

    def when_cancelled(self, tell: Callable[[], object]) -> None:
        """Call this, too, where the turn is cancelled, or has been."""
        self._told.append(tell)
        if self.cancelled:
            tell()

    @property
    def cancelled(self) -> bool:
        """Shall it end?"""
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raise Cancelled where it shall end."""
        if self.cancelled:
            raise Cancelled


class Turns:
    """The work under way, by session and kind."""

    def __init__(self) -> None:
        self._active = dict[tuple[str, str], Turn]()
        self._lock = threading.Lock()

    @contextmanager
    def begin(self, session: str, kind: str) -> Iterator[Turn]:
        """A turn for as long as the body runs."""
        turn, key = Turn(), (session, kind)
        with self._lock:
            self._active[key] = turn
        try:
            yield turn
        finally:
            with self._lock:
                if self._active.get(key) is turn:
                    del self._active[key]

    def cancel(self, session: str, kind: str | None = None) -> None:
        """End a session's work of a kind, or all that it has."""
        with self._lock:
            for (whose, what), turn in self._active.items():
                if whose == session and kind in (None, what):
                    turn.cancel()

    @property
    def busy(self) -> bool:
        """Is anybody at work?"""
        return bool(self._active)

    def end(self, seconds: float) -> None:
        """End everybody's work, and wait for that, but not for ever."""
        with self._lock:
            for turn in self._active.values():
                turn.cancel()
        deadline = time.monotonic() + seconds
        while self.busy and time.monotonic() < deadline:
            time.sleep(0.05)
