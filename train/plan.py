"""What a run is about to do, said before its first step."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

from shared.cache import Manifest
from train.config import DistillConfig
from train.loader import Loader
from train.objectives import OBJECTIVES


def plan(
    config: DistillConfig,
    manifest: Manifest,
    parameters: dict[str, nn.Parameter],
    loader: Loader,
    resumed: Path | None,
    world: int,
) -> str:
    """What is about to happen, in two lines."""
    samples, batch = sum(loader.order.sizes), loader.order.batch_size
    weights = sum(parameter.numel() for parameter in parameters.values())
    passes = config.max_train_steps * batch / samples
    over = f" over {world} processes" if world > 1 else ""
    origin = f"from {resumed}" if resumed else "from the teacher"
    spec = loader.spec
    drawn = f"w in [{spec.w_min:g}, {spec.w_max:g}]"
    if not OBJECTIVES[config.objective].teacher:
        drawn = f"t in [0, {spec.num_ddim_timesteps - 1}]"
    return (
        f"{config.student} student of {config.model}: {weights / 1e6:.2f} M trainable parameters, "
        f"{origin}\n{config.max_train_steps} steps of {batch} samples{over}, "
        f"{passes:.1f} passes over {samples} samples, {drawn}"
    )


def warn_of_small_buckets(loader: Loader) -> None:
    """A bucket smaller than a batch repeats its samples within one."""
    for bucket, size in zip(loader.buckets, loader.order.sizes, strict=True):
        if size < loader.order.batch_size:
            height, width = bucket.layout.latent_size
            print(
                f"note: only {size} samples of {height}x{width} latents, fewer than a batch of "
                f"{loader.order.batch_size}: some repeat within a batch",
                file=sys.stderr,
            )
