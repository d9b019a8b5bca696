"""Draws the same captions with several students; how often are style and content right?

`train evaluate` draws a student as its own objective is drawn. Here a fine-tuned student is drawn
in few steps, too, to see what is left of them, and so is a file of merged LoRAs, which no run made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.style_oracle import score_content, score_style
from shared.cache.conditioning import TextEmbeds
from shared.cache.manifest import open_manifest
from shared.models.family import SCHEDULER_CONFIG, load_config, resolve_model
from shared.models.vae import decode_latents, load_vae
from shared.networks.denoiser import Denoiser
from shared.networks.sampling import Predict, draw_latents, teacher_predictor, teacher_scheduler
from shared.networks.styled import load_teacher
from shared.style import open_styles
from train.config import DistillConfig
from train.evaluation.heldout import HeldOut, load_heldout
from train.evaluation.table import aligned
from train.export.student import load_student
from train.measures.frechet import Gaussian, frechet_distance
from train.measures.shapes import features
from train.objectives import OBJECTIVES
from train.sampling.pictures import write_grid
from train.sampling.samplers import student_predictor

BATCH = 100
SIDE = 64  # of the pictures
CPU = torch.device("cpu")
HEADINGS = ("student", "steps", "style", "content", "both", "FD")
Pictures = NDArray[np.uint8]  # [N, H, W, 3]


@dataclass(frozen=True)
class Line:
    """What is drawn: a name, a UNet with the flags of its training, and in how many steps.

    A `guided` one is drawn as the model itself, with DDIM and classifier-free guidance; others are
    drawn with LCMScheduler, and told the guidance where they have an input for it.
    """

    name: str
    load: Callable[[], tuple[Denoiser, DistillConfig]]
    steps: int
    guided: bool = False

    @property
    def title(self) -> str:
        """What stands above a column."""
        return f"{self.name}\n{self.steps} step{'s'[: self.steps > 1]}"


@dataclass(frozen=True)
class Score:
    """Of the pictures of a line: parts that are right, and the distance to real styled ones."""

    student: str
    steps: int
    style: float
    content: float
    both: float
    fd: float


def of_run(run: Path) -> Callable[[], tuple[Denoiser, DistillConfig]]:
    """The exported student of a run."""
    return lambda: load_student(run, CPU)


def of_lora(model: str, file: Path) -> Callable[[], tuple[Denoiser, DistillConfig]]:
    """A model with a few-step LoRA's file in its weights; in training it had LCD's defaults."""
    source = resolve_model(model).source
    return lambda: (load_teacher(source, open_styles([str(file)])), DistillConfig())


@dataclass(frozen=True)
class Easel:
    """The model, the held-out captions and what is measured against."""

    model: str
    heldout: HeldOut
    seed: int = 0

    @classmethod
    def open(cls, model: str, cache: Path, count: int) -> Easel:
        """Read the first `count` captions and latents of an evaluation cache."""
        return cls(model, load_heldout(cache, open_manifest(cache), count))

    @cached_property
    def source(self) -> str:
        """Where the model is."""
        return resolve_model(self.model).source

    @cached_property
    def real(self) -> Gaussian:
        """Of the held-out pictures, as the VAE shows them."""
        return Gaussian.of(features(self.decoded(self.heldout.latents)))

    def decoded(self, latents: torch.Tensor) -> Pictures:
        """Scaled latents to pixels."""
        vae = load_vae(self.source)
        return decode_latents(vae, latents / vae.config.scaling_factor)

    def draw(self, line: Line) -> Pictures:
        """Every caption once, number i from the noise of seed + i."""
        unet, config = line.load()
        count, shape = len(self.heldout), self.heldout.shape
        parts = []
        for start in range(0, count, BATCH):
            end = min(start + BATCH, count)
            texts = self.heldout.texts[slice(start, end)]
            predict = self.predictor(unet, line, texts)
            scheduler = self.scheduler(config, line)
            seeds = range(self.seed + start, self.seed + end)
            parts.append(draw_latents(predict, scheduler, line.steps, shape, seeds, CPU))
        return self.decoded(torch.cat(parts))

    def predictor(self, unet: Denoiser, line: Line, texts: TextEmbeds) -> Predict:
        """A line's forward."""
        scale, size = resolve_model(self.model).family.guidance_scale, (SIDE, SIDE)
        if line.guided:
            return teacher_predictor(unet, texts, self.heldout.empty, scale, size)
        return student_predictor(unet, texts, scale, size)

    def scheduler(self, config: DistillConfig, line: Line) -> Any:
        """A line's scheduler, with the intervals that its training had."""
        settings = load_config(self.source, SCHEDULER_CONFIG)
        if line.guided:
            return teacher_scheduler("ddim", "trailing", settings)
        return OBJECTIVES["lcd"].sampler.build(settings, config)

    def score(self, line: Line, pictures: Pictures) -> Score:
        """Score drawn pictures."""
        style = score_style(pictures, self.heldout.captions)
        content = score_content(pictures, self.heldout.captions)
        distance = frechet_distance(self.real, Gaussian.of(features(pictures)))
        return Score(
            line.name,
            line.steps,
            style=float(np.mean(style)),
            content=float(np.mean(content)),
            both=float(np.mean(style * content)),
            fd=distance,
        )


def table(scores: Sequence[Score]) -> str:
    """The scores in Markdown."""
    return aligned([HEADINGS, *map(cells, scores)])


def cells(score: Score) -> list[str]:
    """A row of the table."""
    parts = (score.style, score.content, score.both)
    return [score.student, str(score.steps), *(f"{part:.3f}" for part in parts), f"{score.fd:.1f}"]


def write_columns(
    path: Path, captions: Sequence[str], columns: Mapping[str, Pictures], count: int
) -> None:
    """A PNG with a column for each line and a row for each of the first `count` captions."""
    rows = [[pictures[number] for pictures in columns.values()] for number in range(count)]
    write_grid(path, rows, list(columns), captions[:count])
