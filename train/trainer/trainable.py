"""What a run trains: the student, and where its objective has one a partner beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.cache.conditioning import TextEmbeds
from train.config import RunConfig
from train.data.batch import Batch
from train.networks.student import Student, Trained
from train.objectives import objective_of
from train.objectives.objective import Loss
from train.state.optim import base_learning_rate, build_optimizer, partner_learning_rate


@dataclass(frozen=True)
class Trainable:
    """Weights that an optimizer of their own moves by a loss of their own."""

    name: str  # what its numbers in the metrics begin with; empty for the student's
    network: Trained
    loss: Callable[[Loss], Callable[[Batch, TextEmbeds, Student], Tensor]]  # of the objective
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    learning_rate: float  # before its schedule
    due: Callable[[int], bool]  # is it moved in optimizer step 1, 2, ...?

    def has_moved(self, step: int) -> bool:
        """Was it due in any of the first `step` steps?"""
        return any(map(self.due, range(1, step + 1)))


def build_trainables(config: RunConfig, student: Student, batch_size: int) -> tuple[Trainable, ...]:
    """In the order in which a step moves them: the student comes last, and learns of the others."""
    partner = objective_of(config).partner
    parameters = student.trainable()
    trained = Trainable(
        name="",
        network=student,
        loss=lambda objective: objective,
        parameters=parameters,
        optimizer=build_optimizer(config, parameters),
        learning_rate=base_learning_rate(config, batch_size),
        due=lambda step: partner is None or partner.student_due(config, step),
    )
    if partner is None:
        return (trained,)
    assert student.partner is not None
    parameters = student.partner.trainable()
    beside = Trainable(
        name=f"{partner.name}_",
        network=student.partner,
        loss=partner.loss,
        parameters=parameters,
        optimizer=build_optimizer(config, parameters),
        learning_rate=partner_learning_rate(config, batch_size),
        due=lambda step: True,
    )
    return beside, trained
