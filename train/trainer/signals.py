"""SIGTERM, which pre-emptible machines send, and Ctrl-C end a run after a step, not within one."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from train.trainer.distributed import Distributed

ECHO_SECONDS = 3.0  # a launcher passes on the Ctrl-C that its processes had from the terminal


class Stop:
    """Between steps, `asked()` tells all processes the same, whichever of them was signalled.

    They agree by adding up a flag each. The sum of one step is read at the next, so nobody waits;
    it travels over gloo, so a GPU's stream never does either. A second Ctrl-C ends at once.
    """

    def __init__(self, distributed: Distributed) -> None:
        self.flagged = False
        self.interrupted = 0.0  # when Ctrl-C came first
        self._distributed = distributed
        self._former: dict[int, Any] = {}
        self._sent: tuple[torch.Tensor, Any] | None = None
        self._group = dist.new_group(backend="gloo") if distributed.world > 1 else None

    def asked(self) -> bool:
        """Shall the run end here? Entered by all processes, once a step."""
        if self._group is None:
            return self.flagged
        before, flags = self._sent, torch.tensor([int(self.flagged)])
        work = dist.all_reduce(flags, group=self._group, async_op=True)
        self._sent = (flags, work)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0].item())

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._interrupt}
            for number, handler in handlers.items():
                # One that a shell has it ignore, as Ctrl-C in the background, stays ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._former[number] = signal.signal(number, handler)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._sent is not None and error is None:
            self._sent[1].wait()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.flagged = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        echo = self._distributed.world > 1 and now - self.interrupted <= ECHO_SECONDS
        if self.interrupted and not echo:
            raise KeyboardInterrupt
        if not self.interrupted and self._distributed.main:
            line = "interrupted: what is under way is finished and saved; Ctrl-C again ends at once"
            with contextlib.suppress(RuntimeError):  # it came while something else was printed
                print(f"\n{line}", file=sys.stderr)
        self.flagged, self.interrupted = True, self.interrupted or now
