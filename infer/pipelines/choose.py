"""What draws: the flags are looked up on disk, and nothing is loaded yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from infer.config import ModelFlags
from infer.pipelines.loras import LoraFile, find_lora
from infer.pipelines.sampling import Guidance, Sampling, rescheduled, sampling_of
from infer.pipelines.students import Student, identity_of, open_student, prompts_of, refuse_run
from shared.models.family import (
    SCHEDULER_CONFIG,
    Model,
    load_config,
    model_name,
    native_resolution,
    recorded_model,
    resolve_model,
    unet_config,
)
from train.export.newest_run import newest_student


@dataclass(frozen=True)
class Choice:
    """The parts of a pipeline, and how it is drawn."""

    name: str  # as people call it: that of the run, or of the model
    model_name: str
    run: str | None  # the name of the run's folder
    model: Model  # whose text encoders and, unless there is a `unet`, UNet
    unet: Path | None  # of a full student
    vae: str
    own: LoraFile | None  # of a LoRA student
    mixed_in: tuple[LoraFile, ...]
    sampling: Sampling
    side: int  # of a picture unless told otherwise, in pixels
    clip_skip: int  # layers of the text encoders that are left out of the prompts
    prompts: tuple[str, ...]  # unless given

    @property
    def loras(self) -> tuple[LoraFile, ...]:
        """All that are added to the model's weights."""
        return self.mixed_in if self.own is None else (self.own, *self.mixed_in)


def choose(flags: ModelFlags) -> Choice:
    """Look up what the flags name. Raises UserError for what is not there."""
    student = None
    if flags.model is not None:
        refuse_run(flags.model)
    if flags.run is not None or flags.model is None:
        student = open_student(newest_student(flags.run))
    mixed_in = tuple(map(find_lora, flags.lora))
    source = flags.model if student is None else student.teacher(flags.model)
    assert source is not None
    model = resolve_model(source)
    own = LoraFile(student.weights, 1.0, student) if student and student.lora else None
    config = None if student is None else student.config
    identity = identity_of(config)
    return Choice(
        name=model_name(source) if student is None else student.folder.resolve().name,
        model_name=model_name(source),
        run=None if student is None else student.folder.resolve().name,
        model=model,
        unet=None if student is None or student.lora else student.weights,
        vae=vae_of(flags, student, model),
        own=own,
        mixed_in=mixed_in,
        sampling=rescheduled(sampling_with(student, mixed_in, source, model), flags.scheduler),
        side=native_resolution(model) if identity is None else identity.preprocessing.resolution,
        clip_skip=0 if identity is None else identity.text.clip_skip,
        prompts=prompts_of(config),
    )


def vae_of(flags: ModelFlags, student: Student | None, model: Model) -> str:
    """Where the VAE is: what is given, else what the run was made with, else the model's own."""
    if flags.vae is not None:
        return flags.vae
    recorded = None
    if student is not None and student.config is not None and flags.model is None:
        recorded = student.config.vae
    return recorded_model(recorded, "--vae") if recorded else model.source


def sampling_with(
    student: Student | None, mixed_in: tuple[LoraFile, ...], source: str, model: Model
) -> Sampling:
    """How the mixture is drawn: as the first of its parts that is distilled, else as the base is.

    A few-step LoRA makes a few-step model of whatever it is added to.
    """
    if student is not None:
        base = student.sampling(source)
    else:
        scheduler = load_config(model.source, SCHEDULER_CONFIG)
        told = unet_config(model.source).get("time_cond_proj_dim") is not None
        base = sampling_of(model.source, scheduler, told, model.family)
    if base.guidance is not Guidance.CLASSIFIER_FREE:
        return base
    students = [lora.student for lora in mixed_in if lora.student is not None]
    mixed = (one.sampling(source) for one in students)
    return next((one for one in mixed if one.distilled), base)
