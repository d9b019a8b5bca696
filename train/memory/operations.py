"""The floating-point operations of a training step and of drawing, counted without taking them.

The networks of the run and its loss go through a step on torch's meta device, where tensors have
shapes and no numbers, and torch counts the operations of matrix products, convolutions and
attention. So a teacher that is asked, or whose answers are read, a target, a backward pass through
adapters or through all weights: each counts as the run has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
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
from train.flag_groups import CACHED
from train.memory.batch import META, meta_batch
from train.memory.estimate import forward_of
from train.memory.meta import fused_attention
from train.networks.build import student_of
from train.objectives import objective_of
from train.objectives.objective import Loss

Term = Callable[[Batch, TextEmbeds, Any], Tensor]  # what an optimizer lowers


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


def drawing_flops(model: Model, config: RunConfig, steps: int) -> int:
    """Operations of the UNet that draws one picture in so many steps, as the run's student does."""
    unet = unet_config(model.source)
    side = native_resolution(model) // vae_downscale(model.source)
    passes = 2 if objective_of(config).sampler.classifier_free else 1
    counter = FlopCounterMode(display=False)
    attention = patch("torch.nn.functional.scaled_dot_product_attention", fused_attention)
    config = replace(config, mixed_precision="no", offload_ema=False)
    with torch.random.fork_rng([]), META, attention, torch.no_grad():
        teacher = Denoiser.from_config(unet).eval().requires_grad_(False)
        student = student_of(teacher, config).drawing()
        with counter:
            forward_of(student, unet, (side, side), passes)
    return steps * int(counter.get_total_flops())
