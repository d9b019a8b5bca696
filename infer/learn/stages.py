"""The two stages for one picture: `prep encode` into a cache, `train distill` into a LoRA.

A run that was learned is an ordinary run: its folder has the cache and the picture in it besides.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tarfile
from pathlib import Path

from infer.config import Dtype, LearnFlags
from infer.learn.recipe import Recipe
from prep.commands import encode
from prep.config import EncodeConfig
from shared.cache.paths import CachePaths
from shared.cli.ranges import Precision
from shared.storage.files import publish
from train.config import DistillConfig
from train.trainer.defaults import with_defaults
from train.trainer.distill_command import distill
from train.trainer.resume import finished_message

CACHE, SOURCE = "cache", "picture.tar"  # in the run's folder
CHECKPOINTING = 100  # steps that are lost at most where the power fails
PRECISIONS: dict[Dtype, Precision] = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}


def make_cache(flags: LearnFlags, recipe: Recipe, picture: bytes, run: Path) -> None:
    """Encode a picture and its prompt into RUN/cache, unless they are there."""
    if CachePaths(run / CACHE).manifest.exists():
        return
    source = run / SOURCE
    publish([shard(picture, recipe.prompt)], source, run / "tmp")
    with contextlib.redirect_stdout(sys.stderr):  # where people read on, too
        encode(
            EncodeConfig(
                shards=(str(source),),
                model=flags.model,
                vae=flags.vae,
                cache=run / CACHE,
                resolution=recipe.resolution,
                latents="mean",
                decode_workers=1,
                threads=flags.threads,
                device=flags.device,
                report=False,
            )
        )


def shard(picture: bytes, prompt: str) -> bytes:
    """A tar of a picture and its caption, as WebDataset has them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        # What kind of picture it is, its bytes tell; jpg is a name that is read.
        for name, data in (("picture.jpg", picture), ("picture.txt", prompt.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def training(flags: LearnFlags, recipe: Recipe, run: Path) -> DistillConfig:
    """The flags of `train distill`."""
    return DistillConfig(
        model=flags.model,
        vae=flags.vae,
        cache=run / CACHE,
        run=run,
        student="lora",
        objective="denoise",
        lora_rank=recipe.rank,
        learning_rate=recipe.learning_rate,
        lr_scheduler="cosine",
        max_train_steps=recipe.steps,
        train_batch_size=recipe.train_batch_size,
        seed=recipe.seed,
        gradient_checkpointing=flags.gradient_checkpointing,
        mixed_precision=PRECISIONS.get(flags.dtype),
        checkpointing_steps=CHECKPOINTING,
        checkpoints_total_limit=1,
        validation_steps=0,
        report_to=("none",),
        threads=flags.threads,
        device=flags.device,
        dataloader_num_workers=1,
        typed=frozenset({"mixed_precision"}),  # decided here, and nothing to tell of
    )


def is_learned(flags: LearnFlags, recipe: Recipe, run: Path) -> bool:
    """Has this very training been done?"""
    return bool(finished_message(with_defaults(training(flags, recipe, run))))


def train_lora(flags: LearnFlags, recipe: Recipe, run: Path) -> int:
    """Train, or go on where a training was interrupted; the exit status, 0 for a finished one."""
    with contextlib.redirect_stdout(sys.stderr):
        return distill(training(flags, recipe, run))
