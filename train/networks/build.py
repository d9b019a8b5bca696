"""From flags to the networks of a run."""

from __future__ import annotations

from shared.models.family import resolve_model
from shared.networks.denoiser import Denoiser
from train.config import DistillConfig
from train.networks.full import FullStudent
from train.networks.lora import LoraStudent
from train.networks.matched import MatchedStudent
from train.networks.student import Student
from train.networks.teacher import load_run_teacher
from train.objectives import guidance_range, objective_of


def build_student(source: str, config: DistillConfig) -> Student:
    """Build the student that the flags ask for, on the CPU; the teacher lies at `source`."""
    teacher = load_run_teacher(source, config)
    student = student_of(teacher, config, middle_guidance(source, config))
    for network in student.trained():
        if config.gradient_checkpointing:
            network.unet.enable_gradient_checkpointing()
        if config.use_8bit_adam:  # bitsandbytes goes through weights and averages as they lie
            for parameter in network.trainable().values():
                parameter.data = parameter.data.contiguous()
    return student


def student_of(teacher: Denoiser, config: DistillConfig, w: float = 0.0) -> Student:
    """Make the student of a frozen teacher, which becomes part of it.

    `w` is the guidance of a student that it may begin with and that is told its guidance.
    """
    if objective_of(config).partner is not None:
        return MatchedStudent(teacher, config, w)
    if config.student == "lora":
        return LoraStudent(teacher, config)
    if objective_of(config).needs_target:
        return FullStudent(teacher, config)
    return Student(teacher.train().requires_grad_(True))  # the teacher's own UNet, trained as it is


def middle_guidance(source: str, config: DistillConfig) -> float:
    """Half-way between the ends of the guidance that is drawn."""
    return sum(guidance_range(config, resolve_model(source).family)) / 2
