"""What a training step costs beside one of LCD, counted without taking it.

The networks of the run and its loss go through a step on torch's meta device, where tensors have
shapes and no numbers, and torch counts the floating-point operations of matrix products,
convolutions and attention. So a teacher that is asked, or whose answers are read, a target, a
backward pass through adapters or through all weights: each counts as the run has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shared.cache.conditioning import TextEmbeds
from shared.models.family import Model, native_resolution, unet_config, vae_downscale
from shared.networks.denoiser import Denoiser, load_schedule
from train.config import RunConfig
from train.data.batch import Batch
from train.flag_groups import CACHED, ONLINE, FullStudentFlags, LoraFlags, names_of
from train.memory.batch import META, meta_batch
from train.memory.meta import fused_attention
from train.networks.build import student_of
from train.objectives import objective_of
from train.objectives.objective import Loss

Term = Callable[[Batch, TextEmbeds, Any], Tensor]  # what an optimizer lowers

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


def step_flops(model: Model, config: RunConfig, steps: int) -> float:
    """Floating-point operations of a step with one sample, the mean over the first `steps`."""
    partner, (student, *others) = objective_of(config).partner, update_flops(model, config)
    if partner is None:
        return student
    due = sum(partner.student_due(config, step) for step in range(1, steps + 1))
    return sum(others) + student * due / max(steps, 1)


@cache
def update_flops(model: Model, config: RunConfig) -> list[int]:
    """Operations of the losses' updates with one sample: the student's, its partner's."""
    config = replace(config, mixed_precision="no", offload_ema=False)
    schedule = load_schedule(model.source).to(META)
    loss, partner = objective_of(config).build(config, schedule, None), objective_of(config).partner
    terms: list[Term] = [loss] if partner is None else [loss, partner.loss(loss)]
    return [term_flops(model, config, loss, term) for term in terms]


def term_flops(model: Model, config: RunConfig, loss: Loss, term: Term) -> int:
    """Operations of a term's forwards and its backward pass, for one of the loss's samples."""
    unet = unet_config(model.source)
    side = native_resolution(model) // vae_downscale(model.source)
    counter = FlopCounterMode(display=False)
    attention = patch("torch.nn.functional.scaled_dot_product_attention", fused_attention)
    with torch.random.fork_rng([]), META, attention:
        teacher = Denoiser.from_config(unet).eval().requires_grad_(False)
        student = student_of(teacher, config)
        batch = meta_batch(unet, (side, side), 1, loss, answered=config.teacher == CACHED)
        with counter:
            term(batch, batch.text, student).backward()
    return int(counter.get_total_flops())
