"""The commands of `python -m train`: each has the groups of flags that it inherits, and its own.

All stay flat: `config.lora_rank`, `--lora-rank`, `lora_rank = 8` in a file. Of the groups, the last
one comes first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from shared.cli.paths import LocalPath, NameOrPath, PlaceFlag
from shared.cli.ranges import Count, Numbers
from shared.storage.urls import Place
from train import flag_groups as groups


@dataclass(frozen=True)
class DistillConfig(
    groups.PublishFlags, groups.MachineFlags, groups.ProgressFlags, groups.SpeedFlags,
    groups.DataFlags, groups.LoraFlags, groups.DiffusionLossFlags, groups.DistributionFlags,
    groups.FullStudentFlags, groups.TeacherFlags, groups.TargetFlags, groups.PhaseFlags,
    groups.ConsistencyFlags, groups.SolverFlags, groups.OptimizerFlags, groups.RunFlags,
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


@dataclass(frozen=True)
class EvaluateConfig(groups.MachineFlags, groups.ArtistFlags):
    """Compare student and teacher: one table and one picture."""

    eval_cache: PlaceFlag | None = None
    """Cache of held-out pictures: their captions are the prompts, their latents the real ones. The
    samples held out of the run's own cache unless given."""
    scorer: str | None = None
    """MODULE:FUNCTION taking (images [N, H, W, 3] uint8, captions) and giving a score per image."""
    num_samples: Annotated[int, Numbers(int, 65)] = 1000
    batch_size: Count | None = None
    """Pictures drawn at once; unless given 16 of 512 px, 4 of 1024, up to 100 small ones."""
    output: LocalPath | None = None
    """Folder for evaluation.json, evaluation.md and evaluation.png; the run's own unless given."""


@dataclass(frozen=True)
class SampleConfig(groups.MachineFlags, groups.ArtistFlags):
    """Draw pictures with a student, for prompts whose embeddings are in its cache."""

    prompt: tuple[str, ...] = ()
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
    output: LocalPath | None = None
    """The run's folder unless given."""
