"""The commands of `python -m infer`: each has the groups of flags that it inherits, and its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shared.cli.defaults import MODEL
from shared.cli.paths import LocalPath, NameOrPath, StyleFlag, StyleText, Texts
from shared.cli.ranges import Count, Fraction, Natural, NotNegative, Numbers, Positive, Seed

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
    typed: tyro.conf.Suppress[frozenset[str]] = field(
        default=frozenset(), repr=False, compare=False
    )  # no flag; which were given


@dataclass(frozen=True)
class LearnFlags(MachineFlags):
    """How a picture is learned, and of which model."""

    dtype: Dtype = "auto"
    """Of drawing, and of learning beside fp32 weights. Unless given float32 on a CPU; on a GPU
    float16 to draw, bfloat16 to learn where it has that."""
    model: NameOrPath = MODEL
    """A preset, a diffusers folder, a hub id or a single file."""
    vae: NameOrPath | None = None
    """The VAE; the model's own unless given."""
    resolution: Count | None = None
    """Side of the square that is cut out of a picture's middle, in pixels; the model's own unless
    given."""
    rank: Count = 16
    """Of the LoRA."""
    learning_rate: Positive | None = None
    """Falls to 0 along a cosine. 2e-4 for Stable Diffusion, more for narrower networks, unless
    given."""
    train_batch_size: Count = 8
    """Noises in a step: the picture is the same in all of them."""
    gradient_checkpointing: bool = False
    """Learn in less memory and more time."""
    seed: Seed = 0


@dataclass(frozen=True)
class LearnConfig(LearnFlags):
    """Learn a picture: a LoRA that draws it, for `draw`, `merge` and `morph`."""

    picture: tyro.conf.Positional[LocalPath | None] = None
    """The picture."""
    prompt: str | None = None
    """What it shows, in words."""
    steps: Count = 300
    """Of learning."""
    output: LocalPath | None = None
    """Folder of the run; in runs/learned/, named after the picture, unless given."""


@dataclass(frozen=True)
class MorphConfig(LearnFlags):
    """Lead one picture into another: frames, a strip, a GIF and an MP4."""

    pictures: tyro.conf.Positional[tuple[LocalPath, ...]] = ()
    """The first and the last."""
    prompts: tuple[str, ...] = ()
    """What each shows, in words: two of them."""
    frames: Annotated[int, Numbers(int, 3)] = 16
    """How many, the two ends among them."""
    steps: Count = 50
    """Of DDIM, for each frame."""
    learn: bool = True
    """Learn each picture by a LoRA first, and lead one LoRA into the other. Without, the model
    itself draws all frames."""
    learn_steps: Count = 300
    """Of learning a picture."""
    adain: bool = False
    """Let each channel's mean and deviation go evenly from one end's noise to the other's."""
    attention: Fraction = 0.0
    """In this share of the steps, the first ones, self-attention sees keys and values of both ends;
    DiffMorpher takes 0.6."""
    reschedule: bool = False
    """Space the frames evenly by how much changes between them."""
    fps: Count = 8
    """Frames per second of GIF and MP4."""
    output: LocalPath | None = None
    """Folder; in morphed/, named after the pictures, unless given."""
    typed: tyro.conf.Suppress[frozenset[str]] = field(
        default=frozenset(), repr=False, compare=False
    )  # no flag; which were given


@dataclass(frozen=True)
class CompareConfig:
    """Show runs side by side on one page, finished or not: curves, pictures, figures, cost."""

    runs: tyro.conf.Positional[tuple[LocalPath, ...]] = ()
    """Their folders."""
    output: LocalPath = Path("compared")
    """Folder of index.html, which needs nothing beside itself, and compare.md."""
    watch: bool = False
    """Write both again whenever a run's files change, until Ctrl-C; the page loads itself again."""
