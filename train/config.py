"""The commands of `python -m train`: each has the groups of flags that it inherits, and its own.

All stay flat: `config.lora_rank`, `--lora-rank`, `lora_rank = 8` in a file. Of the groups, the last
one comes first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from shared.cli.paths import LocalPath, NameOrPath, PlaceFlag, Texts
from shared.cli.ranges import Count, Fraction, Natural, NotNegative, Numbers, Seed
from shared.storage.urls import Place
from train import flag_groups as groups


@dataclass(frozen=True)
class EvaluationFlags:
    """How good the student is while it is trained."""

    evaluation_steps: Natural = 0
    """Steps between evaluations: held-out captions are drawn, and measured as `train evaluate`
    does; 0 for none."""
    num_eval_samples: Count = 640
    """--evaluation-steps: captions that are drawn."""
    eval_cache: PlaceFlag | None = None
    """--evaluation-steps: cache of held-out pictures; the samples held out of --cache unless
    given."""
    features: str = "shapes"
    """--evaluation-steps: the feature space of the distance, as `train evaluate` has it."""
    scorer: str | None = None
    """--evaluation-steps: what scores each picture, as `train evaluate` has it."""


@dataclass(frozen=True)
class DistillConfig(
    groups.PublishFlags, groups.MachineFlags, EvaluationFlags, groups.ProgressFlags,
    groups.SpeedFlags,
    groups.DataFlags, groups.LoraFlags, groups.DiffusionLossFlags, groups.DistributionFlags,
    groups.FullStudentFlags, groups.StyleFlags, groups.TeacherFlags, groups.TargetFlags,
    groups.PhaseFlags, groups.ConsistencyFlags, groups.SolverFlags, groups.OptimizerFlags,
    groups.RunFlags,
):  # fmt: skip
    """Distil a student from a teacher and a cache, or fine-tune the teacher on it."""

    dry_run: bool = False
    """Check everything, print the plan, and stop."""
    typed: tyro.conf.Suppress[frozenset[str]] = field(
        default=frozenset(), repr=False, compare=False
    )  # no flag; which were given, also with their default value: see train/flags.py


@dataclass(frozen=True)
class RunConfig(DistillConfig):
    """The flags of a run, with what they left open decided; kept as its config.json."""

    model: str
    cache: Place
    run: Path
    init_fingerprint: str | None = None  # of the weights of --init-student
    teacher_lora_sha256: tuple[str, ...] = ()  # of the files of --teacher-lora


@dataclass(frozen=True)
class ArtistFlags:
    """Whose pictures are drawn: the student of a run, and its teacher."""

    run: LocalPath | None = None
    """The run in runs/ with the newest student unless given."""
    model: NameOrPath | None = None
    """Where the teacher is; the run's own, if it is on this machine, unless given."""
    vae: NameOrPath | None = None
    """The VAE that decodes; the run's unless given."""
    guidance_scale: NotNegative | None = None
    """diffusers' meaning (w + 1); the family's unless given. Not for a distilled LoRA's pictures,
    which has learned it."""
    eta: Fraction = 0.0
    """Noise between the student's steps, for schedulers that know it: pcm, tcd (whose paper calls
    it gamma) and denoise."""
    seed: Seed = 0


@dataclass(frozen=True)
class EvaluateConfig(groups.MachineFlags, ArtistFlags):
    """Compare student and teacher: one table and one picture."""

    eval_cache: PlaceFlag | None = None
    """Cache of held-out pictures: their captions are the prompts, their latents the real ones. The
    samples held out of the run's own cache unless given."""
    features: str = "shapes"
    """What distances are measured in: shapes, inception (FID), dinov2 (FD-DINOv2), clip (CMMD), one
    of these with weights of your own (dinov2:FOLDER), or MODULE:FUNCTION taking images
    [N, H, W, 3] uint8 and giving features [N, D]."""
    scorer: str | None = None
    """clip-score, pickscore, one of these with weights of your own (clip-score:FOLDER), or
    MODULE:FUNCTION taking (images [N, H, W, 3] uint8, captions) and giving a score per image."""
    precision_recall: bool = False
    """Two columns more: which share of what is drawn looks real, and of what is real is drawn."""
    nearest_samples: Natural = 0
    """Look for copies: search the training samples, and show so many drawn pictures, those most
    like one, beside it."""
    cache: PlaceFlag | None = None
    """Where the training samples are; the run's own cache unless given. For --nearest-samples."""
    num_samples: Annotated[int, Numbers(int, 2)] = 1000
    """Captions; 65 at least for a Fréchet distance."""
    batch_size: Count | None = None
    """Pictures drawn at once; unless given 16 of 512 px, 4 of 1024, up to 100 small ones."""
    output: LocalPath | None = None
    """Folder for evaluation.json, evaluation.md and evaluation.png; the run's own unless given."""


@dataclass(frozen=True)
class CompareConfig(groups.MachineFlags):
    """Set evaluated students of several runs side by side: one table and one picture."""

    runs: tyro.conf.Positional[tuple[LocalPath, ...]] = ()
    """The runs, each evaluated on the same captions (`train evaluate`)."""
    num_captions: Natural = 6
    """Captions in the picture; 0 for no picture."""
    steps: Count | None = None
    """Steps in which the picture's students draw; each run's own default unless given."""
    seed: Seed | None = None
    """Of the picture's noise; the evaluations' unless given."""
    eval_cache: PlaceFlag | None = None
    """Where the cache of the evaluations lies, if it is not where it was."""
    model: NameOrPath | None = None
    """Where the teacher is; each run's own, if it is on this machine, unless given."""
    vae: NameOrPath | None = None
    """The VAE that decodes; each run's unless given."""
    output: LocalPath = Path("comparison")
    """Folder for compare.json, compare.md and compare.png."""


@dataclass(frozen=True)
class SampleConfig(groups.MachineFlags, ArtistFlags):
    """Draw pictures with a student, for prompts whose embeddings are in its cache."""

    prompt: Texts = ()
    """The prompts of the run's previews unless given."""
    cache: PlaceFlag | None = None
    """Cache that holds the prompts' embeddings; the run's own unless given."""
    steps: Count | None = None
    """4 for a distilled student, 50 for a fine-tuned one (--objective denoise) unless given."""
    num_images: Count = 1
    """Pictures per prompt."""
    output: LocalPath = Path("sample.png")


@dataclass(frozen=True)
class ExportConfig(groups.PublishFlags):
    """Write a checkpoint's student in diffusers format (`distill` does it at its end)."""

    run: LocalPath | None = None
    """The run in runs/ with the newest checkpoint unless given."""
    checkpoint: NameOrPath = "latest"
    """latest, step-N, or the folder of a checkpoint."""
    model: NameOrPath | None = None
    """Where the teacher is; the run's own, if it is on this machine, unless given."""
    standalone: bool = False
    """Write a model of its own, for programs that draw with nothing else: a LoRA is merged into
    its teacher. A plain UNet in diffusers' format and, with VAE and text encoders, one file."""
    guidance_scale: NotNegative | None = None
    """--standalone for a full student that is told its guidance: the one to fold in (diffusers'
    meaning, w + 1)."""
    output: LocalPath | None = None
    """The run's folder unless given; within it, standalone or guidance-SCALE for --standalone."""
