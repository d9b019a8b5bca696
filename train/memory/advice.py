"""Does a run fit on the device, and with which flags would it? Said before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from shared.cli.other_tools.flags import dashed
from shared.errors import UserError
from shared.wording import size_of
from train.config import RunConfig
from train.flags import check_flags, ignored
from train.memory.estimate import ALONE, Parallelism, estimate
from train.networks.precision import check_speed

ROOM = 0.95  # the rest is for the workspace of kernels, and for fragmentation
CUDA = torch.device("cuda")
Change = dict[str, Any]  # of the configuration


def memory_line(
    unet_config: Mapping[str, Any],
    config: RunConfig,
    latent_size: tuple[int, int],
    free: int,
    parallelism: Parallelism = ALONE,
) -> str:
    """What a run will take of a device with `free` bytes, and what to do if that is too much.

    Raises UserError where not even the weights have room.
    """
    found = estimate(unet_config, config, latent_size, parallelism)
    line = (
        f"memory: about {size_of(found.peak)} at peak{each(parallelism)} (weights "
        f"{size_of(found.weights)}, optimizer {size_of(found.optimizer)}, gradients and "
        f"activations {size_of(found.step)}) of {size_of(free)} free; an estimate"
    )
    room = int(free * ROOM)
    if found.peak <= room:
        return line
    better = fitting(unet_config, config, latent_size, room, parallelism)
    advice = "no flags make it fit; take a larger device"
    if better is not None:
        advice = f"it fits with {better[0]} (about {size_of(better[1])})"
    elif config.student == "full":
        more = "more processes" if parallelism.fsdp else "--use_fsdp --fsdp_version 2"
        advice += f", or `accelerate launch` with {more}"
    if found.weights + found.optimizer > free:
        raise UserError(
            f"weights and optimizer take {size_of(found.weights + found.optimizer)}"
            f"{each(parallelism)}, {size_of(free)} of the device are free: {advice}"
        )
    return f"{line}\nwarning: that is too much for the device: {advice}"


def each(parallelism: Parallelism) -> str:
    """Of which process the numbers are."""
    if parallelism.world == 1:
        return ""
    how = "with FSDP's shards of all weights" if parallelism.fsdp else "with DDP's buckets"
    return f" on each of {parallelism.world} processes, {how}"


def fitting(
    unet_config: Mapping[str, Any],
    config: RunConfig,
    latent_size: tuple[int, int],
    room: int,
    parallelism: Parallelism,
) -> tuple[str, int] | None:
    """The first flags, one more at a time, with which a run fits into `room` bytes."""

    def peak(change: Change) -> int:
        return estimate(unet_config, apply(config, change)[0], latent_size, parallelism).peak

    kinds = (config.student,) if config.init_student else (config.student, "lora")
    for student in dict.fromkeys(kinds):
        changes = ladder(config, student, parallelism)
        if not changes or peak(changes[-1]) > room:
            continue  # all of them together are not enough
        change = next(change for change in changes if peak(change) <= room)
        return words(change, apply(config, change)[1]), peak(change)
    return None


def ladder(config: RunConfig, student: str, parallelism: Parallelism) -> list[Change]:
    """Flags that save memory and that the trainer takes: what changes the run least comes first."""
    change: Change = {} if student == config.student else {"student": student}
    changes = [change] if change else []
    for saving in savings(config):
        if accepted(apply(config, change | saving)[0], parallelism):
            change = change | saving
            changes.append(change)
    return changes


def savings(config: RunConfig) -> list[Change]:
    """What saves memory and is not used yet."""
    total = config.train_batch_size * config.gradient_accumulation_steps
    wanted: list[Change] = [
        {"mixed_precision": "bf16"} if config.mixed_precision == "no" else {},
        {"gradient_checkpointing": True},
        {"train_batch_size": 1, "gradient_accumulation_steps": total},
        {"use_8bit_adam": True},
        {"offload_ema": True},
    ]
    return [change for change in wanted if change.items() - vars(config).items()]


def apply(config: RunConfig, change: Change) -> tuple[RunConfig, list[str]]:
    """The configuration as if `change` had been typed, and what must not be typed beside it."""
    changed = replace(config, **change, typed=config.typed | set(change))
    left_out = [name for name in ignored(changed) if name not in change]
    defaults = {name: getattr(RunConfig, name) for name in left_out}
    return replace(changed, **defaults, typed=changed.typed - set(left_out)), left_out


def accepted(config: RunConfig, parallelism: Parallelism) -> bool:
    """Do the trainer's own checks take these flags?"""
    try:
        check_flags(config)
        check_speed(config, CUDA, parallelism.fsdp)
    except UserError:
        return False
    return True


def words(change: Change, left_out: list[str]) -> str:
    """Flags as they are typed."""
    typed = [
        dashed(name) + ("" if value is True else f" {value}") for name, value in change.items()
    ]
    without = f" and without {' '.join(map(dashed, left_out))}" if left_out else ""
    return " ".join(typed) + without
