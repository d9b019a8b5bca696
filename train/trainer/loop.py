"""The training loop: algorithm 1 of the LCM paper, numbered as in `LCD`, and what surrounds it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor, nn

from shared.errors import UserError
from train.config import RunConfig
from train.data.batch import Batch
from train.state.optim import set_learning_rate
from train.state.owner import release
from train.trainer.reporting.metrics import Moved
from train.trainer.resume import LATEST
from train.trainer.run import Distillation
from train.trainer.signals import Stop
from train.trainer.trainable import Trainable

INTERRUPTED = 130  # the exit status that shells give to Ctrl-C
SMALLEST_SCALE = 2.0**-10  # of the fp16 loss; torch begins at 2**16


def distill(run: Distillation) -> int:
    """Train to `max_train_steps`, SIGTERM or Ctrl-C; the exit status, 130 where that was the end.

    The run is this process's until then.
    """
    try:
        return take_steps(run)
    finally:
        if run.distributed.main:
            release(run.config.run)


def take_steps(run: Distillation) -> int:
    """Take optimizer steps from where the run stands; save, and export where it is finished."""
    config, saved = run.config, run.step
    with Stop(run.distributed) as stop:
        with closing(run.loader.batches()) as batches, run.recorder:
            evaluated = evaluate(run, stop)  # what a run that was ended in it has left to do
            while run.step < config.max_train_steps and not stop.asked():
                if not take_step(run, batches):
                    continue  # an fp16 overflow: the same step again, with the next samples
                # Pictures first: killed before it has saved, a run draws them again.
                if due(run.step, config.validation_steps, config):
                    run.preview()
                if due(run.step, config.checkpointing_steps, config):
                    run.save()
                    saved = run.step
                evaluated = evaluate(run, stop)  # what takes minutes comes when all is saved
            finished = evaluated and run.step == config.max_train_steps
            if run.step != saved:
                run.save()
        if finished:  # and a signal waits for what is left to do
            run.export()
    if finished:
        return 0
    if run.distributed.main:
        same = config.resume_from_checkpoint in (None, LATEST)
        command = "the same command" if same else f"--resume-from-checkpoint {LATEST}"
        print(f"stopped after step {run.step}; {command} goes on from there", file=sys.stderr)
    return INTERRUPTED if stop.interrupted else 0


def evaluate(run: Distillation, stop: Stop) -> bool:
    """Evaluate the student where that is due; False where the run was asked to end meanwhile."""
    if run.step == 0 or not due(run.step, run.config.evaluation_steps, run.config):
        return True
    try:
        return run.evaluate(stop.asked)
    except Exception:  # of a scorer, perhaps: what was trained is worth more
        if run.distributed.world == 1:  # others may not have come so far
            run.save()
        raise


def take_step(run: Distillation, batches: Iterator[Batch]) -> bool:
    """Take one optimizer step with the next batch; False where fp16 gradients overflowed.

    Of several networks those whose gradients did not overflow have moved then, and move again.
    """
    step, batch = run.step + 1, next(batches)
    seed_dropout(run.config.seed, step, run.distributed.rank)
    moved = [move(run, one, batch) for one in run.trained if one.due(step)]  # 1 to 5
    taken = settle(run.scaler, run.distributed.device)
    run.position += run.loader.order.batch_size
    if taken:
        run.step = step
        run.student.after_step()  # 6
        number = run.position // run.loader.order.batch_size - 1
        run.recorder.record(step, number, moved)
    return taken


def move(run: Distillation, one: Trainable, batch: Batch) -> Moved:
    """Move the weights of one of the networks that are trained, unless fp16 gradients overflow."""
    rate = set_learning_rate(one.optimizer, one.learning_rate, run.step + 1, run.config)
    loss, norm = backward(run, one, batch)  # 1 to 4, and the gradient of 5
    run.scaler.step(one.optimizer)  # 5
    one.optimizer.zero_grad(set_to_none=True)
    return Moved(one.name, loss, norm, rate)


def backward(run: Distillation, one: Trainable, batch: Batch) -> tuple[Tensor, Tensor]:
    """Accumulate the gradients of a batch; returns its mean loss and the norm before clipping."""
    losses = []
    objective = one.loss(run.objective)
    for number, part in enumerate(micro_batches(batch, run.accumulation), start=1):
        with run.distributed.accumulating(one.network, last=number == run.accumulation):
            with run.autocast():
                loss = objective(part, run.empty, run.student)
            run.scaler.scale(loss / run.accumulation).backward()
        losses.append(loss.detach())
    run.scaler.unscale_(one.optimizer)
    norm = nn.utils.clip_grad_norm_(one.parameters.values(), run.config.max_grad_norm or math.inf)
    return torch.stack(losses).mean(), norm


def settle(scaler: torch.amp.GradScaler, device: torch.device) -> bool:
    """Adapt the scale of the fp16 loss; False where an optimizer's step was skipped for it.

    Raises UserError where gradients overflow at every scale. Only fp16 waits for the device here,
    once.
    """
    one = torch.ones((), device=device)
    before = scaler.scale(one)  # on the device: to read it would be a wait of its own
    scaler.update()
    taken = not scaler.is_enabled() or bool(scaler.scale(one) >= before)
    if not taken and scaler.get_scale() < SMALLEST_SCALE:
        raise UserError(
            "gradients overflow fp16 at every loss scale; use --mixed-precision bf16, or no"
        )
    return taken


def due(step: int, every: int, config: RunConfig) -> bool:
    """Every so many steps and at the end; never where `every` is 0."""
    return every > 0 and (step % every == 0 or step == config.max_train_steps)


def micro_batches(batch: Batch, count: int) -> Iterator[Batch]:
    """A batch in `count` equal parts, so that accumulation leaves the sample stream as it is."""
    parts = {name: tensor.chunk(count) for name, tensor in batch.tensors().items()}
    for number in range(count):
        yield replace(batch, **{name: tensors[number] for name, tensors in parts.items()})


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout is torch's only random draw in a step; keyed by it, a resume repeats it."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**64)
