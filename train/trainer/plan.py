"""What a run is about to do, said before its first step."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy

from shared.cache.manifest import Manifest
from shared.errors import UserError
from shared.models.family import Model, unet_config
from shared.wording import counted
from train.config import RunConfig
from train.data.loader import Loader
from train.memory.estimate import Parallelism
from train.objectives import objective_of, uses_guidance
from train.state.checkpoint import TrainingState
from train.state.resume_checks import divide
from train.trainer.distributed import Distributed
from train.trainer.run import Distillation


def batches(
    config: RunConfig, distributed: Distributed, buckets: int, before: TrainingState | None
) -> tuple[int, int]:
    """`divide`, and a word where --gradient-accumulation-steps was given and says otherwise.

    Beside --global-batch-size that is a UserError. A resumed run keeps its global batch and tells
    so, for the same command may be given again on another number of processes.
    """
    batch_size, accumulation = divide(config, distributed.world, buckets, before)
    wanted = config.gradient_accumulation_steps
    if "gradient_accumulation_steps" not in config.typed or wanted == accumulation:
        return batch_size, accumulation
    if config.global_batch_size is not None:
        raise UserError(
            f"--gradient-accumulation-steps {wanted}: --global-batch-size "
            f"{config.global_batch_size} is {accumulation} of them here; give one of the two flags"
        )
    if distributed.main:
        print(
            f"note: {accumulation} accumulation steps instead of --gradient-accumulation-steps "
            f"{wanted}: a resumed run keeps its global batch; --global-batch-size changes it",
            file=sys.stderr,
        )
    return batch_size, accumulation


def with_steps(config: RunConfig, batch_size: int, samples: int) -> RunConfig:
    """The same with `max_train_steps` for as many passes as `--num-train-epochs` asks for."""
    epochs = config.num_train_epochs
    if epochs is None:
        return config
    samples = min(samples, config.max_train_samples or samples)
    return replace(config, max_train_steps=math.ceil(epochs * samples / batch_size))


def plan(run: Distillation, resumed: Path | None) -> str:
    """What is about to happen, in two lines."""
    config, order, world = run.config, run.loader.order, run.distributed.world
    samples, batch = sum(order.sizes), order.batch_size
    weights = sum(parameter.numel() for parameter in run.parameters.values())
    beside = "".join(
        f", {sum(p.numel() for p in one.parameters.values()) / 1e6:.2f} M more of the "
        f"{one.name.rstrip('_')} network"
        for one in run.trained[:-1]
    )
    passes = config.max_train_steps * batch / samples
    over = f" over {world} processes" if world > 1 else ""
    origin = f"from {resumed or config.init_student or 'the teacher'}"
    spec = run.loader.spec
    drawn = f"{spec.num_ddim_timesteps} intervals"
    if uses_guidance(config):
        drawn = f"w in [{spec.w_min:g}, {spec.w_max:g}]"
    elif not objective_of(config).takes_guidance:
        drawn = f"t in [0, {spec.num_ddim_timesteps - 1}]"
    return (
        f"{config.student} student of {config.model}: {weights / 1e6:.2f} M trainable parameters"
        f"{beside}, {origin}\n"
        f"{counted(config.max_train_steps, 'step')} of {counted(batch, 'sample')}{over}, "
        f"{passes:.1f} passes over {counted(samples, 'sample')}, {drawn}, "
        f"learning rate {run.learning_rate:g}"
    )


def evaluation_plan(run: Distillation, model: Model) -> list[str]:
    """What the evaluations of a run are going to cost, in a line; none without."""
    config, evaluations = run.config, run.evaluations
    if evaluations is None:
        return []
    from train.memory.operations import drawing_flops, step_flops  # which take torch's slower tools

    drawn, steps = evaluations.num_samples, evaluations.drawing_steps
    samples = config.evaluation_steps * run.loader.order.batch_size
    trained = samples * step_flops(model, config, config.max_train_steps)
    part = drawn * drawing_flops(model, config, steps) / trained
    work = f"about {part:.0%}" if part >= 0.01 else "less than 1%"
    lines = [
        f"every {counted(config.evaluation_steps, 'step')} an evaluation draws {drawn:,} held-out "
        f"captions in {counted(steps, 'step')}: {work} of the UNet work between two"
    ]
    if evaluations.space.distances.few_pictures(drawn, evaluations.width):
        lines.append(
            f"note: {drawn} pictures are few for {evaluations.width} features; compare distances "
            "only with those of the same captions"
        )
    return lines


def print_memory(
    config: RunConfig, accumulation: int, model: Model, manifest: Manifest, distributed: Distributed
) -> None:
    """On a GPU, print what the largest latents will take, before anything is loaded there.

    Raises UserError where not even the weights have room.
    """
    if distributed.device.type != "cuda" or not distributed.main:
        return
    sizes = [layout.latent_size for layout in manifest.layouts]
    if not sizes:
        return
    from train.memory.advice import memory_line  # which takes torch's slower tools

    unet = unet_config(model.source)
    config = replace(config, gradient_accumulation_steps=accumulation)  # also where it followed
    free, _ = torch.cuda.mem_get_info(distributed.device)
    line = memory_line(unet, config, max(sizes, key=math.prod), free, parallelism_of(distributed))
    print(line, file=sys.stderr)


def note_small_buckets(loader: Loader) -> None:
    """A bucket smaller than a batch repeats its samples within one."""
    for bucket, size in zip(loader.buckets, loader.order.sizes, strict=True):
        if size < loader.order.batch_size:
            height, width = bucket.layout.latent_size
            print(
                f"note: only {counted(size, 'sample')} of {height}x{width} latents, fewer than a "
                f"batch of {loader.order.batch_size}: some repeat within a batch",
                file=sys.stderr,
            )


def parallelism_of(distributed: Distributed) -> Parallelism:
    """How the processes of a run divide its memory."""
    if not distributed.fsdp:
        return Parallelism(distributed.world)
    plugin = FullyShardedDataParallelPlugin()
    return Parallelism(
        distributed.world,
        fsdp=True,
        offloaded=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        gathered=not plugin.reshard_after_forward,
    )
