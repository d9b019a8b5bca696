"""The commands of `python -m infer`: each has the groups of flags that it inherits, and its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shared.cli.paths import LocalPath, NameOrPath, StyleFlag, StyleText, Texts
from shared.cli.ranges import Count, Fraction, Natural, NotNegative, Numbers, Seed

Dtype = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class MachineFlags:
    """Where the networks run, and in what precision."""

    device: str = "auto"
    dtype: Dtype = "auto"
    """float16 on a GPU and float32 on a CPU unless given."""
    threads: Count | None = None
    """CPU threads of the networks; as many as the process may use unless given."""


@dataclass(frozen=True)
class ModelFlags(MachineFlags):
    """What draws: the student of a run, or a model, with LoRAs on top."""

    run: LocalPath | None = None
    """A run's folder or an exported student's. Unless given, and without --model, the run in runs/
    with the newest student."""
    model: NameOrPath | None = None
    """A preset, a diffusers folder, a hub id or a single file. With --run, where its teacher is."""
    lora: StyleFlag = ()
    """LoRAs in diffusers' or kohya's form, or runs of LoRA students, each with its scale (1 unless
    given); repeatable."""
    vae: NameOrPath | None = None
    """The VAE; the run's or the model's own unless given."""
    scheduler: str | None = None
    """diffusers' scheduler: lcm, tcd, ddim, euler, DPMSolverMultistep, ...; unless given the one
    that the student was trained for, or the model's own."""


@dataclass(frozen=True)
class MergeConfig:
    """Merge LoRAs into one, or into the model that they are for."""

    loras: tyro.conf.Positional[tuple[StyleText, ...]] = ()
    """LoRAs in diffusers' or kohya's form, or runs of LoRA students, each with its scale (1 unless
    given)."""
    model: NameOrPath | None = None
    """The model that they are for: a preset, a diffusers folder, a hub id or a single file. A run's
    teacher unless given."""
    form: Literal["kohya", "diffusers", "folder", "single-file"] = "kohya"
    """kohya: a LoRA file for every program. diffusers: one for diffusers alone. folder: the model
    with the LoRAs in it, in diffusers' format. single-file: the same for ComfyUI and its like."""
    rank: Count | None = None
    """Reduce the merged LoRA to this rank (by SVD; the error is printed). Unless given the ranks
    are joined, which is exact."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of what is written."""
    output: LocalPath | None = None
    """merged.safetensors, or the folder merged, unless given."""


@dataclass(frozen=True)
class DrawConfig(ModelFlags):
    """Draw pictures: any prompt, with a student or a model, LoRAs mixed, from pictures too."""

    prompt: Texts = ()
    """Any text; several draw a row each; repeatable."""
    prompts: LocalPath | None = None
    """A text file with a prompt in each line."""
    negative_prompt: str | None = None
    """What guidance leads away from; for models and students that are drawn with guidance."""
    steps: Count | None = None
    """4 for a distilled student, 50 otherwise, unless given."""
    guidance_scale: NotNegative | None = None
    """diffusers' meaning (w + 1); as trained, or the family's, unless given: 1 for students that
    have learned it."""
    eta: Fraction = 0.0
    """Noise between the steps, for schedulers that know it (TCD's call it gamma)."""
    seed: Seed = 0
    """Of the first picture of each prompt; the next ones count up from it."""
    num_images: Count = 1
    """Pictures per prompt."""
    image: LocalPath | None = None
    """A picture to begin from."""
    strength: Annotated[float, Numbers(float, 0, 1, above=True)] | None = None
    """How far to go from --image: 1 keeps nothing of it. 0.6 unless given, with --mask 1."""
    mask: LocalPath | None = None
    """With --image: what is white is drawn anew, what is black stays."""
    controlnet: NameOrPath | None = None
    """A ControlNet: a diffusers folder, a hub id or a single file."""
    control_image: LocalPath | None = None
    """What the ControlNet sees."""
    canny: bool = False
    """Show it the edges of --control-image (needs opencv-python-headless)."""
    control_scale: NotNegative | None = None
    """Weight of the ControlNet; 1 unless given."""
    size: str | None = None
    """SIDE or WIDTHxHEIGHT in pixels; as the model was trained, in the shape of --image, unless
    given."""
    clip_skip: Natural | None = None
    """Layers of the text encoders to leave out; as in the run's cache unless given."""
    output: LocalPath = Path("drawn")
    """Folder of the pictures and a contact sheet; a name with .png for one file: the picture, or
    the sheet of several."""
