"""What `draw` is going to do, decided before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from infer.config import DrawConfig
from infer.draw import flags
from infer.pictures.read import Size, edges, picture_size, read_mask, read_picture
from infer.pipelines.choose import Choice
from infer.pipelines.sampling import Guidance
from shared.cli.config import installed_version
from shared.errors import UserError
from shared.wording import counted

LARGEST_SEED = 2**63 - 1
SAME_SHAPE = 0.02  # of a ratio of sides, for pictures of a few hundred pixels


@dataclass(frozen=True)
class Given:
    """Pictures that go in, in the size that is drawn."""

    image: Image.Image | None = None
    mask: Image.Image | None = None
    control: Image.Image | None = None

    @property
    def kind(self) -> str:
        """In diffusers' names of pipelines: what is made of the picture."""
        if self.image is None:
            return ""
        return "Img2Img" if self.mask is None else "Inpaint"


@dataclass(frozen=True)
class Job:
    """Pictures to draw: every prompt from every seed."""

    choice: Choice
    prompts: tuple[str, ...]
    seeds: range
    size: Size
    steps: int
    guidance_scale: float
    eta: float
    clip_skip: int
    negative_prompt: str | None
    strength: float | None
    control_scale: float
    given: Given
    dtype: str
    told: Mapping[str, str]  # names of the files given, for the pictures' metadata

    @property
    def count(self) -> int:
        """Of pictures."""
        return len(self.prompts) * len(self.seeds)

    @property
    def passes(self) -> int:
        """Of the UNet in a step."""
        told = self.choice.sampling.guidance is Guidance.TOLD
        return 2 if self.guidance_scale > 1 and not told else 1

    @property
    def folded(self) -> float | None:
        """The guidance_scale to build into a full student.

        Diffusers' pipelines for a ControlNet and a picture together know no way to tell it.
        """
        told = self.choice.sampling.guidance is Guidance.TOLD
        both = self.given.control is not None and self.given.image is not None
        return self.guidance_scale if told and both else None

    @property
    def mixed_in(self) -> str:
        """The LoRAs that are added to what draws, in words."""
        return ", ".join(map(str, self.choice.mixed_in))

    def pictures(self) -> Iterator[tuple[str, int]]:
        """Prompt and seed of each."""
        return ((prompt, seed) for prompt in self.prompts for seed in self.seeds)

    def __str__(self) -> str:
        """What is drawn, with what, and how."""
        width, height = self.size
        many = f" ({counted(len(self.prompts), 'prompt')}, {counted(len(self.seeds), 'seed')})"
        from_what = {"": "", "Img2Img": " from a picture", "Inpaint": " into a picture"}
        with_loras = f" with {self.mixed_in}" if self.mixed_in else ""
        steered = ", steered by a ControlNet" if self.given.control is not None else ""
        scheduler = type(self.choice.sampling.scheduler).__name__
        return (
            f"draw {counted(self.count, 'picture')}{many if self.count > 1 else ''} of "
            f"{width}x{height} px{from_what[self.given.kind]}: {self.choice.name}{with_loras}"
            f"{steered}, {counted(self.steps, 'step')} of {scheduler}, guidance_scale "
            f"{self.guidance_scale:g} ({self.choice.sampling.guidance.value}), {self.dtype}"
        )

    def metadata(self, prompt: str, seed: int) -> dict[str, str]:
        """What a picture's file says of it; no path of this machine."""
        width, height = self.size
        known: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": self.negative_prompt,
            "seed": seed,
            "steps": self.steps,
            "guidance_scale": f"{self.guidance_scale:g}",
            "eta": f"{self.eta:g}" if self.eta else None,
            "size": f"{width}x{height}",
            "model": self.choice.model_name,
            "run": self.choice.run,
            "loras": self.mixed_in or None,
            "scheduler": type(self.choice.sampling.scheduler).__name__,
            "clip_skip": self.clip_skip or None,
            "strength": None if self.strength is None else f"{self.strength:g}",
            **self.told,
            "dtype": self.dtype,
            "Software": f"Latent Distillery {installed_version()}",
        }
        return {name: str(value) for name, value in known.items() if value is not None}


def plan_job(config: DrawConfig, choice: Choice, dtype: str) -> Job:
    """Decide what the flags leave open. Raises UserError for what cannot work."""
    prompts = flags.prompts_of(config, choice)
    steps = flags.steps_of(config, choice)
    strength = flags.strength_of(config, steps)
    scale = flags.guidance_of(config, choice)
    flags.check_eta(config, choice)
    size = flags.size_of(config, choice)
    last = config.seed + config.num_images - 1
    if last > LARGEST_SEED:
        raise UserError(f"--seed {config.seed}: the last picture's would be {last}; give a smaller")
    given = read_given(config, size)
    return Job(
        choice=choice, prompts=prompts, seeds=range(config.seed, last + 1), size=size, steps=steps,
        guidance_scale=scale, eta=config.eta, negative_prompt=config.negative_prompt,
        clip_skip=flags.clip_skip_of(config, choice),
        strength=strength, given=given, dtype=dtype, told=told_files(config),
        control_scale=1.0 if config.control_scale is None else config.control_scale,
    )  # fmt: skip


def read_given(config: DrawConfig, size: Size) -> Given:
    """Read the pictures. Raises UserError for what is none."""
    image = mask = control = None
    if config.image is not None:
        image = read_picture(config.image, "--image", size)
    if config.mask is not None:
        mask = read_mask(config.mask, size)
        note_other_shape(config)
    if config.control_image is not None:
        control = read_picture(config.control_image, "--control-image", size)
        control = edges(control) if config.canny else control
    return Given(image, mask, control)


def note_other_shape(config: DrawConfig) -> None:
    """Say that a mask of another shape than its picture's lies over another part of it."""
    assert config.image is not None
    assert config.mask is not None
    picture, mask = picture_size(config.image, "--image"), picture_size(config.mask, "--mask")
    if abs(picture[0] * mask[1] / (picture[1] * mask[0]) - 1) > SAME_SHAPE:
        print(
            f"note: --mask is {mask[0]}x{mask[1]}, --image {picture[0]}x{picture[1]}: each is "
            "scaled and cut to the size drawn, so that the mask does not lie where it did",
            file=sys.stderr,
        )


def told_files(config: DrawConfig) -> dict[str, str]:
    """The names of what went in."""
    found = dict[str, str]()
    for name in ("image", "mask", "control_image"):
        path = getattr(config, name)
        if path is not None:
            found[name] = path.name
    if config.controlnet is not None:
        scale = 1.0 if config.control_scale is None else config.control_scale
        canny = ", canny" if config.canny else ""
        found["controlnet"] = f"{config.controlnet.rpartition('/')[2]} at {scale:g}{canny}"
    return found
