"""Trained students, drawn by stock diffusers and by `train sample`."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from shared.cache.conditioning import load_conditioning
from shared.cache.paths import CachePaths
from shared.models.family import resolve_model
from train.config import DistillConfig
from train.trainer.loop import distill
from train.trainer.setup import prepare

PIPELINES = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}
RANK, ALPHA = 4, 6.0
CASES = [("sd", "lora"), ("xl", "full")]
OTHERS = [("sd", "full"), ("xl", "lora")]  # each part of which is one of a case above
PARAMS = [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)]


@dataclass
class Run:
    folder: Path
    cache: Path
    model: Path
    family: str
    kind: str
    prompt: str

    def load(self, unet=None):
        """A stock pipeline with the teacher's parts."""
        more = {} if unet is None else {"unet": unet}
        pipe = PIPELINES[self.family].from_pretrained(self.model, dtype=torch.float32, **more)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def load_student(self):
        """The same with the student, by diffusers alone."""
        if self.kind == "full":
            unet = UNet2DConditionModel.from_pretrained(
                self.folder / "unet", torch_dtype=torch.float32
            )
            return self.load(unet)
        pipe = self.load()
        pipe.load_lora_weights(self.folder)
        return pipe

    @cached_property
    def teacher(self):
        return self.load()

    @cached_property
    def student(self):
        return self.load_student()


def make_run(folder: Path, cache: Path, model: Path, family: str, kind: str, **more) -> Run:
    """A few steps at a rate that visibly moves the student."""
    prompt = load_conditioning(CachePaths(cache).conditioning).prompts[1]
    config = DistillConfig(
        model=str(model), cache=cache, run=folder, student=kind, train_batch_size=4,
        max_train_steps=5, learning_rate=2e-2 if kind == "lora" else 2e-3, lora_rank=RANK,
        lora_alpha=ALPHA, unet_time_cond_proj_dim=32, ema_decay=0.3, guidance_init="random",
        validation_steps=0, threads=1, **more,
    )  # fmt: skip
    distill(prepare(config))
    return Run(folder, cache, model, family, kind, prompt)


def draw_stock(pipe, run: Run, steps=4, scale=None, seed=0, scheduler=LCMScheduler, **options):
    """A picture by a stock pipeline; for students with the scheduler that people use for LCM."""
    config = scheduler.load_config(run.model / "scheduler")
    pipe.scheduler = scheduler.from_config(config, **options)
    usual = 1.0 if run.kind == "lora" else resolve_model(str(run.model)).family.guidance_scale
    answer = pipe(
        run.prompt, num_inference_steps=steps, guidance_scale=scale or usual, output_type="np",
        generator=torch.Generator().manual_seed(seed), height=64, width=64,
    )  # fmt: skip
    return (answer.images[0] * 255).round().astype(int)


def draw_ours(cli, run: Run, folder: Path, *words) -> np.ndarray:
    picture = folder / "picture.png"
    answer = cli("train", "sample", "--run", run.folder, "--prompt", run.prompt, "--threads", 1,
                 "--output", picture, *words)  # fmt: skip
    assert answer.status == 0, answer.err
    assert answer.out == f"{picture}\n"
    return np.asarray(Image.open(picture)).astype(int)


def assert_same_picture(a: np.ndarray, b: np.ndarray) -> None:
    """To a rounding or two: the cache holds embeddings in fp16, the pipeline makes them in fp32."""
    assert a.shape == b.shape == (64, 64, 3)
    difference = np.abs(a - b)
    assert difference.mean() < 1
    assert (difference <= 2).mean() > 0.95
