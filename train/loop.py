"""The training loop: algorithm 1 of the LCM paper, and what surrounds a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import closing

import torch
from torch import Tensor

from train.batch import Batch
from train.config import DistillConfig
from train.setup import Distillation


def distill(run: Distillation) -> None:
    """Take optimizer steps from where the run stands to `max_train_steps`."""
    config, optimizer, student = run.config, run.optimizer, run.student
    with closing(run.loader.batches()) as batches, run.recorder:
        for step in range(run.first_step, config.max_train_steps + 1):
            seed_dropout(config.seed, step)
            set_learning_rate(optimizer, run.learning_rate, step, config)
            losses = []
            for batch in micro_batches(next(batches), config.gradient_accumulation_steps):
                with run.autocast():
                    loss = run.objective(batch, run.empty, student)
                (loss / config.gradient_accumulation_steps).backward()
                losses.append(loss.detach())
            norm = torch.nn.utils.clip_grad_norm_(run.parameters.values(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            student.after_step()
            run.recorder.record(step, torch.stack(losses).mean(), norm)
            if due(step, config.checkpointing_steps, config):
                run.save(step)
            if due(step, config.validation_steps, config):
                run.preview(step)
    run.export()


def due(step: int, every: int, config: DistillConfig) -> bool:
    """Every so many steps and at the end; never where `every` is 0."""
    return every > 0 and (step % every == 0 or step == config.max_train_steps)


def micro_batches(batch: Batch, count: int) -> Iterator[Batch]:
    """A batch in `count` equal parts, so that accumulation leaves the sample stream as it is."""
    fields = {name: split(value, count) for name, value in vars(batch).items()}
    for number in range(count):
        yield Batch(**{name: parts[number] for name, parts in fields.items()})


def split(value: Tensor | None, count: int) -> list[Tensor | None]:
    """Equal parts along the first axis."""
    if value is None:
        return list(itertools.repeat(None, count))
    return list(value.chunk(count))


def set_learning_rate(
    optimizer: torch.optim.Optimizer, base: float, step: int, config: DistillConfig
) -> None:
    """Set the rate of optimizer step `step` (1, 2, ...)."""
    for group in optimizer.param_groups:
        group["lr"] = base * learning_rate_factor(step, config)


def learning_rate_factor(step: int, config: DistillConfig) -> float:
    """A pure function of the step: linear warm-up, then constant, linear or cosine to zero."""
    warmup, total = config.lr_warmup_steps, config.max_train_steps
    if step <= warmup:
        return step / warmup
    done = (step - warmup) / max(total - warmup, 1)
    if config.lr_scheduler == "linear":
        return 1 - done + 1 / max(total - warmup, 1)
    if config.lr_scheduler == "cosine":
        return float(0.5 * (1 + torch.cos(torch.tensor(done * torch.pi))))
    return 1.0


def seed_dropout(seed: int, step: int) -> None:
    """Dropout is torch's only random draw in a step; keyed by it, a resume repeats it."""
    torch.manual_seed(seed * 1_000_003 + step)
