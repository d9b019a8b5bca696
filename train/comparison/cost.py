"""What a training step costs beside one of LCD, counted without taking it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.models.family import Model
from train.config import RunConfig
from train.flag_groups import ONLINE, FullStudentFlags, LoraFlags, names_of
from train.memory.operations import step_flops

# What the baseline has in common with the run; the teacher is the same model.
SAME = ("student", *names_of(LoraFlags), *names_of(FullStudentFlags))


def relative_cost(model: Model, config: RunConfig, steps: int) -> float:
    """A step's operations per sample, in those of LCD with the same student and a teacher asked.

    The mean over the run's first `steps` steps, at the model's own resolution. What saves memory
    (--gradient-checkpointing) or time (--mixed-precision) is left out on both sides.
    """
    # Runs that are alike are counted once, wherever they lie.
    nowhere: dict[str, Any] = {"model": model.source, "cache": Path(), "run": Path()}
    lcd = RunConfig(**nowhere, teacher=ONLINE, **{name: getattr(config, name) for name in SAME})
    return step_flops(model, replace(config, **nowhere), steps) / step_flops(model, lcd, 1)
