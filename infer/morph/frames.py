"""Frames between two pictures, drawn by the stock pipeline (DiffMorpher, arXiv 2312.07409)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from infer.morph.attention import Kept, blending, keeping
from infer.morph.interpolate import adain, between, slerp
from infer.morph.job import Job
from infer.morph.spacing import Pixels, evenest, evenly, where_most_changes
from infer.pictures.read import content, framed
from infer.pipelines import inversion
from infer.pipelines.adapters import share
from infer.pipelines.inversion import Prompt


@dataclass(frozen=True)
class End:
    """One of the two pictures, as the model sees it."""

    reconstruction: Pixels  # by the VAE alone
    prompt: Prompt
    noise: Tensor  # that DDIM's inversion finds, `[1, C, h, w]`
    drawn: Pixels  # from that noise
    kept: Kept  # what its self-attention said meanwhile


@dataclass(frozen=True)
class Artist:
    """Draws the frames of a job; `on_step` is called after each pass of the UNet."""

    pipe: Any
    job: Job
    on_step: Callable[[], object]

    def end(self, number: int) -> End:
        """Invert the first picture (0) or the last (1), with its own LoRA, and draw it again."""
        lesson = self.job.lessons[number]
        self.share(float(number))
        prompt = inversion.encode_prompt(self.pipe, lesson.recipe.prompt)
        pixels = framed(content(lesson.picture, "picture"), lesson.recipe.resolution)
        latents = inversion.encode_picture(self.pipe, pixels)
        noise = inversion.invert(self.pipe, self.job.way, latents, prompt, self.on_step)
        with keeping(self.pipe.unet, self.job.kept_steps) as kept:
            drawn = self.draw(noise, prompt)
        return End(inversion.decode(self.pipe, latents), prompt, noise, drawn, kept)

    def frame(self, first: End, last: End, a: float) -> Pixels:
        """The picture at `a`, between 0 and 1."""
        self.share(a)
        noise = slerp(first.noise, last.noise, a)
        if self.job.config.adain:
            noise = adain(noise, first.noise, last.noise, a)
        both: AbstractContextManager[None] = nullcontext()
        if self.job.kept_steps:
            both = blending(self.pipe.unet, first.kept, last.kept, a)
        with both:
            return self.draw(noise, between(first.prompt, last.prompt, a))

    def draw(self, noise: Tensor, prompt: Prompt) -> Pixels:
        """The picture `[H, W, 3]` that a noise leads to."""
        latents = inversion.redraw(self.pipe, self.job.way, noise, prompt, self.on_step)
        return inversion.decode(self.pipe, latents)

    def share(self, a: float) -> None:
        """Let the LoRAs count for 1 - a and a."""
        if self.job.runs:
            share(self.pipe, [1 - a, a])


@dataclass(frozen=True)
class Morph:
    """The two ends, and all frames by their places from 0 to 1, in order."""

    ends: tuple[End, End]
    frames: dict[float, Pixels]

    @property
    def pictures(self) -> list[Pixels]:
        """The frames."""
        return list(self.frames.values())

    def psnr(self) -> tuple[float, float]:
        """How near the first and the last frame come to the VAE's reconstructions, in dB."""
        pairs = zip(self.ends, (self.pictures[0], self.pictures[-1]), strict=True)
        first, last = (inversion.psnr(drawn, end.reconstruction) for end, drawn in pairs)
        return first, last


def draw_frames(pipe: Any, job: Job, on_step: Callable[[], object]) -> Morph:
    """Draw all frames; where they are to be spaced evenly, more of them, to choose from."""
    artist = Artist(pipe, job, on_step)
    first, last = artist.end(0), artist.end(1)
    drawn = {0.0: first.drawn, 1.0: last.drawn}
    for a in evenly(job.config.frames)[1:-1]:
        drawn[a] = artist.frame(first, last, a)
    for _ in range(job.added):
        a = where_most_changes(drawn)
        drawn[a] = artist.frame(first, last, a)
    places = evenest(drawn, job.config.frames)
    return Morph((first, last), {a: drawn[a] for a in places})
