"""What the rest of the house knows of an objective: everything about it is said in its own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import SCHEDULE, Schedule
from train.config import DistillConfig
from train.data.batch import Batch


class Teacher(Protocol):
    """Networks that can be asked what the teacher says."""

    def teacher(
        self, z: Tensor, t: Tensor, batch: Batch, empty: TextEmbeds
    ) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional prediction, without gradients."""


def teacher_outputs(
    networks: Teacher, z: Tensor, t: Tensor, batch: Batch, empty: TextEmbeds
) -> tuple[Tensor, Tensor]:
    """What the teacher says of z at t, with the captions and without: read, or computed now.

    Answers in the batch are to this z and this t: they were drawn by what the loader drew.
    """
    if batch.answers is None:
        return networks.teacher(z, t, batch, empty)
    cond, uncond = batch.answers.to(z.dtype).unbind(1)
    return cond, uncond


class Loss(Protocol):
    """A loss with its settings; one that inherits from this wants no more drawn than LCD does."""

    @property
    def intervals(self) -> int:
        """`batch.index` is drawn from 0 .. intervals - 1."""

    @property
    def uniforms(self) -> int:
        """How many numbers in [0, 1) it wants of each sample besides: `batch.uniforms`."""
        return 0

    @property
    def noises(self) -> int:
        """How many noises in the latents' shape it wants of each sample: `batch.noises`."""
        return 0

    def __call__(self, batch: Batch, empty: TextEmbeds, networks: Any) -> Tensor:
        """The loss of a batch, a scalar; `empty` is the unconditional embedding, one row.

        `networks` has the forwards that the objective's own file asks for.
        """


@dataclass(frozen=True)
class Partner:
    """A network that is trained beside the student, in every step, by an optimizer of its own."""

    name: str  # its numbers in the metrics are NAME_loss, NAME_grad_norm, NAME_learning_rate
    loss: Callable[[Any], Callable[[Batch, TextEmbeds, Any], Tensor]]  # of the objective's loss
    learning_rate: Callable[[DistillConfig], float]
    student_due: Callable[[DistillConfig, int], bool]  # does optimizer step 1, 2, ... move it?


@dataclass(frozen=True)
class Sampler:
    """How an objective's students are drawn, here and with stock diffusers."""

    scheduler: type[Any]  # diffusers'; the export carries it
    options: Callable[[DistillConfig], dict[str, Any]]  # of the scheduler, besides the teacher's
    classifier_free: bool  # two passes a step, as the teacher; otherwise guidance is learned
    steps: int  # unless given, and unless the student has fewer
    preview_steps: tuple[int, ...]  # those of them that the student has
    most_steps: Callable[[DistillConfig], int] | None = None  # those that T has where there is none

    def build(self, teacher: Mapping[str, Any], config: DistillConfig) -> Any:
        """Make the scheduler of a run's students from the config of the teacher's.

        What that one leaves open is filled in: schedulers' own defaults are others than training's.
        """
        return self.scheduler.from_config({**SCHEDULE, **teacher}, **self.options(config))

    def usual_steps(self, config: DistillConfig) -> int:
        """Return the steps of a picture unless given."""
        return self.steps if self.most_steps is None else min(self.steps, self.most_steps(config))

    def few_steps(self, config: DistillConfig) -> list[int]:
        """Return all the steps that a student has, where they are fewer than usual."""
        usual = self.usual_steps(config)
        return [usual] if usual < self.steps else []

    def previewed_steps(self, config: DistillConfig) -> list[int]:
        """Return the numbers of steps of previews."""
        most = self.most_steps
        wanted = [n for n in self.preview_steps if most is None or n <= most(config)]
        return sorted({*wanted, *self.few_steps(config)})


@dataclass(frozen=True)
class Card:
    """What the model card says of an objective's students."""

    purpose: str  # "A LoRA ...", with {teacher} in it
    settings: tuple[str, ...]  # flags in its table; those of the other kind of student are left out
    tags: tuple[str, ...] = ()  # on the hub
    other_programs: Callable[[DistillConfig], str] | None = None  # how it is drawn in ComfyUI
    drawing: str = ""  # what else there is to say of drawing with diffusers


@dataclass(frozen=True)
class Objective:
    """An objective: a line in `train.objectives`, a file beside it."""

    # UserError for settings that cannot work. With answers of a teacher, the number of timesteps
    # that they are at comes too, and `batch.index` is drawn from those.
    build: Callable[[DistillConfig, Schedule, int | None], Loss]
    flags: tuple[str, ...]  # of the configuration, that mean something to it and not to all
    learning_rates: Mapping[str, float]  # by kind of student, where none is given
    needs_teacher: bool  # its two outputs, with and without the caption
    needs_target: bool  # a slower or frozen self of the student
    takes_guidance: bool  # w is drawn, and a full student is told it
    sampler: Sampler
    card: Card
    partner: Partner | None = None

    @property
    def reads_answers(self) -> bool:
        """Can a cache's answers of the teacher serve it?"""
        return "teacher" in self.flags
