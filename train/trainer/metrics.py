"""What a run leaves to look at: progress bar, metrics.jsonl, trackers."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.cli.config import to_dict
from shared.cli.progress import Progress
from shared.errors import UserError
from shared.storage import ownership
from shared.storage.files import dump_json, guard, publish
from shared.storage.reading import read_if_there
from shared.storage.typed_json import typed
from shared.wording import rate as rate_of
from train.config import RunConfig
from train.data.loader import Loader
from train.networks.dtensor import whole
from train.state.checkpoint import whole_checkpoints
from train.trainer.distributed import Distributed
from train.trainer.trackers import Trackers

EXPLODED = 1e3  # latents have a standard deviation of about 1, and so has a hopeless prediction
NAMED = 3  # samples that an error names; diverged.json has them all


@dataclass(frozen=True)
class Window:
    """The steps between two lines of metrics, their numbers on the way to the CPU."""

    steps: tuple[tuple[int, int], ...]  # each with its global batch
    values: Tensor  # [2, steps] fp64 on the CPU: loss and gradient norm
    arrived: torch.cuda.Event | None
    seconds: float
    waited: float  # of them, for the loader
    learning_rate: float


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
        self.steps: list[tuple[int, int]] = []
        self.values: list[Tensor] = []
        self.pending: Window | None = None
        self.rate = 0.0

    def __enter__(self) -> Recorder:
        self.since = time.perf_counter()
        if self.distributed.main:
            self.path = self.config.run / "metrics.jsonl"
            keep_until(self.path, self.done)
            with guard(self.path):
                self.file = self.path.open("a")
            folder = self.config.logging_dir or self.config.run / "logs"
            reported = [name for name in self.config.report_to if name != "none"]
            project = self.config.tracker_project_name
            self.trackers = Trackers(reported, folder, project, to_dict(self.config), self.done)
            self.progress = Progress("distill", self.config.max_train_steps, "step", self.done)
            self.progress.__enter__()
        return self

    def record(self, step: int, batch: int, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Note a step: its global batch, loss, gradient norm and learning rate.

        Raises UserError, at the next line or the one after, where the loss has lost its way or a
        gradient is not finite.
        """
        self.steps.append((step, batch))
        self.values.append(torch.stack([loss.double(), whole(norm).double()]))
        note = ""
        if step % self.config.logging_steps == 0:
            note = self._turn(self._close_window(rate))
        if self.distributed.main:
            self.progress.update(1, note)
        self.rate = rate

    def flush(self) -> None:
        """Write all that has been noted, durably: the checkpoint that follows vouches for it."""
        self._turn(self._close_window(self.rate) if self.values else None)
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

    def _close_window(self, rate: float) -> Window:
        """The steps since the last line; their numbers set out for the CPU."""
        values, arrived = self.distributed.mean(torch.stack(self.values, 1)), None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = pinned.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(values.device))
        now, waited = time.perf_counter(), self.loader.waited
        window = Window(
            tuple(self.steps), values, arrived, now - self.since, waited - self.waited, rate
        )
        self.since, self.waited, self.steps, self.values = now, waited, [], []
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
        for (step, batch), loss, norm in zip(window.steps, losses, norms, strict=True):
            if not math.isfinite(loss) or loss > EXPLODED:
                raise UserError(self.diverged(f"the loss is {loss:g}", step, batch))
            if not math.isfinite(norm):
                raise UserError(self.diverged(f"the gradient norm is {norm:g}", step, batch))
        if not self.distributed.main:
            return ""
        step = window.steps[-1][0]
        loss = sum(losses) / len(losses)
        seconds = max(window.seconds, 1e-9)
        rate = len(losses) * self.loader.order.batch_size / seconds
        values = {
            "loss": loss,
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": window.learning_rate,
            "samples_per_second": rate,
            "loader_wait": window.waited / seconds,
        }
        ownership.check(self.path)
        with guard(self.path):
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        self.trackers.log(values, step)
        return f"loss {loss:.4f}, {rate_of(rate, 'sample')}"

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


def keep_until(path: Path, step: int) -> None:
    """Drop lines past `step`, which a run resumed from there will write again.

    Lines that are damaged go too, and that is said: they are for people, and stop no run.
    """
    lines = (read_if_there(path) or b"").splitlines(keepends=True)
    if not lines:
        return
    steps = [step_of(line) for line in lines]
    if damaged := sum(found is None for found in steps[:-1]):  # the last may have been cut
        print(f"note: {damaged} damaged lines are left out of {path}", file=sys.stderr)
    kept = [line for line, at in zip(lines, steps, strict=True) if at is not None and at <= step]
    publish(kept, path, path.parent / "tmp")


def step_of(line: bytes) -> float | None:
    """The step that a line of metrics is about, or None where it is no such line."""
    try:
        return typed(json.loads(line)["step"], float, "step") if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
