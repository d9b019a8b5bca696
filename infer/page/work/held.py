"""One model in memory at a time."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch


class Held:
    """Keeps what was loaded last; what comes next is loaded when that is gone."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._model: Any = None
        self._lock = threading.RLock()

    def get(self, key: Hashable, load: Callable[[], Any]) -> Any:
        """The model of a key: the one that is held, or `load`ed in its place."""
        with self._lock:
            if key != self._key:
                self.free()
                self._model = load()
                self._key = key
            return self._model

    def holds(self, key: Hashable) -> bool:
        """Would `get` load nothing?"""
        return key == self._key

    def free(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._key = self._model = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
