"""What a run leaves to look at: progress bar, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from shared.errors import UserError
from shared.progress import Progress
from shared.storage import publish
from train.checkpoint import whole_checkpoints
from train.config import DistillConfig


class Recorder:
    """Collects a number per step and writes their means every `logging_steps`.

    Losses stay tensors until then, so that a step never waits for the device.
    """

    def __init__(self, config: DistillConfig, done: int) -> None:
        self.config, self.done = config, done
        self.batch_size = config.train_batch_size * config.gradient_accumulation_steps
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def __enter__(self) -> Recorder:
        self.path = self.config.run / "metrics.jsonl"
        keep_until(self.path, self.done)
        self.file = self.path.open("a")
        self.board = SummaryWriter(self.config.run / "tensorboard", purge_step=self.done + 1)
        self.progress = Progress("distill", self.config.max_train_steps, "step", self.done)
        self.progress.__enter__()
        self.since = time.perf_counter()
        return self

    def record(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Note a step. Raises UserError, at the next logging step, where the loss is not finite."""
        self.losses.append(loss)
        self.norms.append(grad_norm)
        note = ""
        if step % self.config.logging_steps == 0 or step == self.config.max_train_steps:
            note = self.flush(step)
        self.progress.update(1, note)

    def flush(self, step: int) -> str:
        """Write the means since the last flush; returns the note for the progress bar."""
        if not self.losses:
            return ""
        loss = sum(float(x) for x in self.losses) / len(self.losses)
        norm = sum(float(x) for x in self.norms) / len(self.norms)
        if not math.isfinite(loss):
            raise UserError(self.diverged(step))
        now = time.perf_counter()
        rate = len(self.losses) * self.batch_size / max(now - self.since, 1e-9)
        self.since = now
        self.losses, self.norms = [], []
        values = {"loss": loss, "grad_norm": norm, "samples_per_second": rate}
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(f"train/{name}", value, step)
        return f"loss {loss:.4f}, {rate:.0f} samples/s"

    def picture(self, step: int, sheet: NDArray[np.uint8]) -> None:
        """Show a preview in TensorBoard."""
        self.board.add_image("previews", sheet, step, dataformats="HWC")

    def say(self, line: str) -> None:
        """Print a line without disturbing the progress bar."""
        self.progress.write(line)

    def diverged(self, step: int) -> str:
        """What to say when the numbers are no longer finite."""
        saved = whole_checkpoints(self.config.run)
        last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        return (
            f"loss or weights are no longer finite at step {step}; {last}; "
            "lower --learning-rate, add --lr-warmup-steps, or use --mixed-precision no"
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.__exit__(kind, error, trace)
        self.board.close()
        self.file.close()


def keep_until(path: Path, step: int) -> None:
    """Drop lines past `step`, which a run resumed from there will write again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        publish(["".join(kept).encode()], path, path.parent / "tmp")
