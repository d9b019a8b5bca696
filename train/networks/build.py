"""From flags to the networks of a run."""

from __future__ import annotations

from shared.models.family import resolve_model
from shared.networks.denoiser import load_unet
from train.config import DistillConfig
from train.networks.full import FullStudent
from train.networks.lora import LoraStudent
from train.networks.matched import MatchedStudent
from train.networks.student import Student
from train.objectives import objective_of


def build_student(source: str, config: DistillConfig) -> Student:
    """Build the student that the flags ask for, on the CPU; the teacher lies at `source`."""
    student: Student
    if objective_of(config).partner is not None:
        student = MatchedStudent(load_unet(source), config, middle_guidance(source, config))
    elif config.student == "lora":
        student = LoraStudent(source, config)
    elif objective_of(config).needs_target:
        student = FullStudent(source, config)
    else:  # the teacher's own UNet, trained as it is
        student = Student(load_unet(source).train().requires_grad_(True))
    for network in student.trained():
        if config.gradient_checkpointing:
            network.unet.enable_gradient_checkpointing()
        if config.use_8bit_adam:  # bitsandbytes goes through weights and averages as they lie
            for parameter in network.trainable().values():
                parameter.data = parameter.data.contiguous()
    return student


def middle_guidance(source: str, config: DistillConfig) -> float:
    """Half-way between the flags' ends of the guidance, or those of the model's family."""
    family = resolve_model(source).family
    low = family.w_min if config.w_min is None else config.w_min
    high = family.w_max if config.w_max is None else config.w_max
    return (low + high) / 2
