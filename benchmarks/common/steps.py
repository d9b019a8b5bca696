"""Steps of the trainer, taken one by one, timed, and counted."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.common.models import random_weights
from train.config import RunConfig
from train.data.batch import Batch
from train.trainer.loop import move, settle
from train.trainer.run import Distillation
from train.trainer.setup import prepare

Shape = tuple[int, ...]


def open_run(
    source: Path, cache: Path, run: Path, device: torch.device, **flags: Any
) -> Distillation:
    """A run of the real trainer, ready for its first step; the weights are random."""
    config = RunConfig(
        model=str(source), cache=cache, run=run, device=str(device), validation_steps=0,
        report_to=(), **flags,
    )  # fmt: skip
    # What the step will take is found out by taking it, and the estimate would cost seconds.
    quiet = patch("train.trainer.setup.print_memory"), contextlib.redirect_stderr(io.StringIO())
    with random_weights(device), quiet[0], quiet[1]:
        return prepare(config)


class Cached:
    """The trainer's own step, fed by its loader or with one resident batch."""

    def __init__(self, run: Distillation) -> None:
        self.run, self.batches = run, run.loader.batches()
        self.waited = 0.0
        first = next(self.batches)
        # A copy: on a CPU the loader fills its batches again.
        copies = {name: tensor.clone() for name, tensor in first.tensors().items()}
        self.resident = replace(first, **copies)

    def fed(self) -> None:
        """A step with the loader's next batch; `waited` adds up the seconds until it came."""
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - began
        self.take(batch)

    def with_resident(self) -> None:
        """A step with the first batch, which stays on the device."""
        self.take(self.resident)

    def take(self, batch: Batch) -> None:
        """What `train.trainer.loop.distill` does between two batches, without records."""
        run = self.run
        for one in run.trained:
            if one.due(run.step + 1):
                move(run, one, batch)
        settle(run.scaler, run.distributed.device)
        run.step += 1
        run.student.after_step()

    def close(self) -> None:
        """End the loader's threads."""
        self.batches.close()


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in a step."""
    aten = torch.ops.aten
    cpu = {  # torch's counter knows the attention of GPUs alone
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=cpu)
    with counter:
        step()
    return int(counter.get_total_flops())


def attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def attention_backward_flops(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Wall time of a step, the mean of `times` in a row."""
    return clocks(step, device, times)[0]


def clocks(step: Callable[[], object], device: torch.device, times: int) -> tuple[float, float]:
    """Wall and processor seconds of a step; the latter count this process's threads alone."""
    synchronize(device)
    began = time.perf_counter(), time.process_time()
    for _ in range(times):
        step()
    synchronize(device)
    wall, processor = time.perf_counter() - began[0], time.process_time() - began[1]
    return wall / times, processor / times


def compare(
    step: Callable[[], object],
    other: Callable[[], object],
    pairs: int,
    device: torch.device,
    times: int = 1,
) -> dict[str, Any]:
    """Interleaved pairs, each other one in the other order: medians of the seconds and of the
    ratio of a pair.

    On a CPU also of processor time, which neighbours on the machine cannot take away.
    """
    found = []
    for number in range(pairs):
        order = (step, other) if number % 2 == 0 else (other, step)
        took = {action: clocks(action, device, times) for action in order}
        found.append((took[step], took[other]))
    ratios = sorted(a / b for (a, _), (b, _) in found)
    quarter = len(ratios) // 4
    figures: dict[str, Any] = {
        "pairs": pairs,
        "seconds": statistics.median(a for (a, _), _ in found),
        "other_seconds": statistics.median(b for _, (b, _) in found),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
    }
    if device.type == "cpu":
        figures["processor_ratio"] = statistics.median(a / b for (_, a), (_, b) in found)
    return figures
