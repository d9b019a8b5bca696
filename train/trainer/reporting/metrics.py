"""What a run leaves to look at: progress bar, metrics.jsonl, trackers."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.cli.config import to_dict
from shared.cli.progress import Progress
from shared.errors import UserError
from shared.storage import ownership
from shared.storage.files import dump_json, guard, publish
from shared.wording import rate as rate_of
from train.config import RunConfig
from train.data.loader import Loader
from train.networks.dtensor import whole
from train.state.checkpoint import whole_checkpoints
from train.trainer.distributed import Distributed
from train.trainer.reporting.log_lines import GPU_MEMORY, METRICS, PROCESS_MEMORY, cut_back
from train.trainer.reporting.trackers import Trackers

EXPLODED = 1e3  # latents have a standard deviation of about 1, and so has a hopeless prediction
NAMED = 3  # samples that an error names; diverged.json has them all


@dataclass(frozen=True)
class Moved:
    """What a step did to one of the networks that it trains."""

    name: str  # what its numbers begin with: nothing for the student's
    loss: Tensor
    norm: Tensor  # of its gradient
    learning_rate: float


@dataclass(frozen=True)
class Noted:
    """Whose numbers these are, of which step and which global batch."""

    step: int
    batch: int
    name: str


@dataclass(frozen=True)
class Window:
    """The steps between two lines of metrics, their numbers on the way to the CPU."""

    noted: tuple[Noted, ...]
    values: Tensor  # [2, noted] fp64 on the CPU: loss and gradient norm
    arrived: torch.cuda.Event | None
    seconds: float
    waited: float  # of them, for the loader
    learning_rates: dict[str, float]


class Recorder:
    """Collects the numbers of each step and writes their means every `logging_steps`.

    They stay on the device until a window ends and are read when the next one does, so that no step
    waits for the device. All processes enter `record`, since losses are averaged over them; one
    writes.
    """

    def __init__(
        self, config: RunConfig, distributed: Distributed, loader: Loader, done: int
    ) -> None:
        """`done` steps are behind."""
        self.config, self.distributed, self.loader, self.done = config, distributed, loader, done
        self.waited = 0.0
        self.noted: list[Noted] = []
        self.values: list[Tensor] = []
        self.rates: dict[str, float] = {}
        self.pending: Window | None = None

    def __enter__(self) -> Recorder:
        self.since = time.perf_counter()
        if self.distributed.main:
            self.path = self.config.run / METRICS
            cut_back(self.config.run, self.done)
            with guard(self.path):
                self.file = self.path.open("a")
            folder = self.config.logging_dir or self.config.run / "logs"
            reported = [name for name in self.config.report_to if name != "none"]
            project = self.config.tracker_project_name
            self.trackers = Trackers(reported, folder, project, to_dict(self.config), self.done)
            self.progress = Progress("distill", self.config.max_train_steps, "step", self.done)
            self.progress.__enter__()
        return self

    def record(self, step: int, batch: int, moved: Sequence[Moved]) -> None:
        """Note a step: its global batch, and what it moved.

        Raises UserError, at the next line or the one after, where the loss has lost its way or a
        gradient is not finite.
        """
        for one in moved:
            self.noted.append(Noted(step, batch, one.name))
            self.values.append(torch.stack([one.loss.double(), whole(one.norm).double()]))
            self.rates[one.name] = one.learning_rate
        note = ""
        if step % self.config.logging_steps == 0:
            note = self._turn(self._close_window())
        if self.distributed.main:
            self.progress.update(1, note)

    def flush(self) -> None:
        """Write all that has been noted, durably: the checkpoint that follows vouches for it."""
        self._turn(self._close_window() if self.values else None)
        self.catch_up()
        if self.distributed.main:
            with guard(self.path):
                os.fsync(self.file.fileno())

    def catch_up(self) -> None:
        """Write the line that is due, so that trackers get what follows in the order of steps."""
        self._turn(None)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done meanwhile is no training: its time does not count as the steps'."""
        if self.distributed.device.type == "cuda":
            torch.cuda.synchronize(self.distributed.device)  # steps still under way do count
        began = time.perf_counter()
        yield
        now = time.perf_counter()
        self.since += now - max(began, self.since)  # a window may have been closed in between

    def _close_window(self) -> Window:
        """The steps since the last line; their numbers set out for the CPU."""
        values, arrived = self.distributed.mean(torch.stack(self.values, 1)), None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = pinned.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(values.device))
        now, waited = time.perf_counter(), self.loader.waited
        spent = now - self.since, waited - self.waited
        window = Window(tuple(self.noted), values, arrived, *spent, self.rates)
        self.since, self.waited = now, waited
        self.noted, self.values, self.rates = [], [], {}
        return window

    def _turn(self, window: Window | None) -> str:
        """Write what has arrived: on a GPU the window before; returns the bar's note."""
        if window is not None and window.arrived is None:
            return self._write(window)
        before, self.pending = self.pending, window
        return "" if before is None else self._write(before)

    def _write(self, window: Window) -> str:
        if window.arrived is not None:
            window.arrived.synchronize()  # a window ago: it is there
        losses, norms = window.values.tolist()
        for one, loss, norm in zip(window.noted, losses, norms, strict=True):
            whose = f" ({one.name}loss)" if one.name else ""
            if not math.isfinite(loss) or loss > EXPLODED:
                what = f"the loss is {loss:g}{whose}"
                raise UserError(self.diverged(what, one.step, one.batch))
            if not math.isfinite(norm):
                what = f"the gradient norm is {norm:g}{whose}"
                raise UserError(self.diverged(what, one.step, one.batch))
        if not self.distributed.main:
            return ""
        step, batch_size = window.noted[-1].step, self.loader.order.batch_size
        samples = (window.noted[-1].batch + 1) * batch_size  # skipped steps consumed theirs, too
        seconds = max(window.seconds, 1e-9)
        steps = len({one.step for one in window.noted})
        rate = steps * batch_size / seconds
        values = means(window, losses, norms)
        note = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if k.endswith("loss"))
        values |= {"samples_per_second": rate, "loader_wait": window.waited / seconds}
        values |= peak_memory(self.distributed.device)
        ownership.check(self.path)
        with guard(self.path):
            self.file.write(json.dumps({"step": step, "samples": samples, **values}) + "\n")
            self.file.flush()
        self.trackers.log(values, step)
        return f"{note}, {rate_of(rate, 'sample')}"

    def diverged(self, what: str, step: int, batch: int) -> str:
        """What to say when the numbers are no longer finite, or the loss has exploded.

        All samples of the step's global batch are in `diverged.json`.
        """
        names = self.loader.names(batch)
        run = self.config.run
        if self.distributed.main:
            publish(
                [dump_json({"what": what, "step": step, "batch": batch, "samples": names})],
                run / "diverged.json",
                run / "tmp",
            )
        saved = whole_checkpoints(run)
        last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return (
            f"{what} at step {step} (samples {', '.join(names[:NAMED])}{more}: "
            f"{run / 'diverged.json'}); {last}; lower --learning-rate, add --lr-warmup-steps, "
            "or use --mixed-precision no"
        )

    def __exit__(self, *error: Any) -> None:
        if self.distributed.main:
            self.progress.__exit__(*error)
            self.trackers.close()
            self.file.close()


def means(window: Window, losses: Sequence[float], norms: Sequence[float]) -> dict[str, float]:
    """Loss, gradient norm and learning rate of each network that was moved, the student's first."""
    found = {}
    for name, rate in sorted(window.learning_rates.items()):
        own = [number for number, one in enumerate(window.noted) if one.name == name]
        found[f"{name}loss"] = sum(losses[number] for number in own) / len(own)
        found[f"{name}grad_norm"] = sum(norms[number] for number in own) / len(own)
        found[f"{name}learning_rate"] = rate
    return found


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes this process has had so far, previews and all, under a name that says where.

    On a GPU what torch has allocated there; elsewhere the resident set of the whole process.
    """
    if device.type == "cuda":
        return {GPU_MEMORY: torch.cuda.max_memory_allocated(device)}
    unit = 1 if sys.platform == "darwin" else 1024
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {PROCESS_MEMORY: usage.ru_maxrss * unit}
