"""The networks of a run: a full student with EMA target or without, or adapters on the teacher."""

from __future__ import annotations

from typing import Protocol

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from train.config import DistillConfig
from train.data.batch import Batch
from train.networks.fine_tuned import FineTuned
from train.networks.full import FullStudent
from train.networks.lora import LoraStudent
from train.objectives import OBJECTIVES


class Student(Protocol):
    """What the loop, the checkpoints and the exports need of any kind.

    An objective's own file says which further forwards it needs (see its `Networks`).
    """

    unet: UNet2DConditionModel
    live: nn.Module  # what the student's own forward goes through: `unet`, or DDP around it

    def networks(self) -> list[UNet2DConditionModel]:
        """Every UNet in memory; the last has the teacher's weights, where any are frozen."""

    def student(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """With gradients."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name, fp32."""

    def after_step(self) -> None:
        """Move the target after an optimizer step."""

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of the networks."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""

    def drawing(self) -> UNet2DConditionModel:
        """The network that previews are drawn with, on the device."""

    def exported(self) -> UNet2DConditionModel:
        """The network that people will draw with, fp32."""


def build_student(source: str, config: DistillConfig) -> Student:
    """The student that the flags ask for, on the CPU."""
    full = FullStudent if OBJECTIVES[config.objective].teacher else FineTuned
    kind = LoraStudent if config.student == "lora" else full
    student: Student = kind(source, config)
    if config.gradient_checkpointing:
        student.unet.enable_gradient_checkpointing()
    if config.use_8bit_adam:  # bitsandbytes goes through weights and averages as they lie in memory
        for parameter in student.trainable().values():
            parameter.data = parameter.data.contiguous()
    return student
