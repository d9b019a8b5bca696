"""What the rest of the house knows of an objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import Schedule
from train.config import DistillConfig
from train.data.batch import Batch


class Loss(Protocol):
    """A loss with its settings."""

    schedule: Schedule

    @property
    def intervals(self) -> int:
        """`batch.index` is drawn from 0 .. intervals - 1."""

    def __call__(self, batch: Batch, empty: TextEmbeds, networks: Any) -> Tensor:
        """The loss of a batch, a scalar; `empty` is the unconditional embedding, one row.

        `networks` has the forwards that the objective's own file asks for.
        """


@dataclass(frozen=True)
class Objective:
    """One line of the table: every "is it LCD?" question is a field here."""

    build: Callable[[DistillConfig, Schedule], Loss]  # UserError for settings that cannot work
    flags: tuple[str, ...]  # of the configuration, that mean nothing to the other objectives
    learning_rates: Mapping[str, float]  # by kind of student, where none is given
    teacher: bool  # are there a teacher and a target beside the student?
    few_steps: bool  # drawn by LCMScheduler with guidance built in, or as the teacher is
    preview_steps: tuple[int, ...]
    sample_steps: int  # unless told otherwise
