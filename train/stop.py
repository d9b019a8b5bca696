"""SIGTERM, which pre-emptible machines send, ends a run after a step and not within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from train.team import Team


class Stop:
    """Between steps, `asked()` tells all processes the same, whichever of them was signalled.

    They agree by adding up a flag each. The sum of one step is read at the next, so nobody waits;
    it travels over gloo, so a GPU's stream never does either.
    """

    def __init__(self, team: Team) -> None:
        self.flagged = False
        self._former: Any = None
        self._sent: tuple[torch.Tensor, Any] | None = None
        self._group = dist.new_group(backend="gloo") if team.world > 1 else None

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
            self._former = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)
        if self._sent is not None and error is None:
            self._sent[1].wait()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.flagged = True
