"""From flags to the networks of a run."""

from __future__ import annotations

from shared.models.fingerprint import signs
from shared.networks.denoiser import Denoiser, load_unet
from train.config import DistillConfig
from train.networks.full import FullStudent
from train.networks.lora import LoraStudent
from train.networks.student import Student
from train.objectives import objective_of


def build_student(source: str, config: DistillConfig) -> Student:
    """Build the student that the flags ask for, on the CPU; the teacher lies at `source`."""
    teacher = load_unet(source)
    student = student_of(teacher, config, signs(teacher.parameters()))
    if config.gradient_checkpointing:
        student.unet.enable_gradient_checkpointing()
    if config.use_8bit_adam:  # bitsandbytes goes through weights and averages as they lie in memory
        for parameter in student.trainable().values():
            parameter.data = parameter.data.contiguous()
    return student


def student_of(teacher: Denoiser, config: DistillConfig, teacher_signs: str) -> Student:
    """Make the student of a frozen teacher, which becomes part of it.

    `teacher_signs` tell the teacher (shared.models.fingerprint).
    """
    if config.student == "lora":
        return LoraStudent(teacher, config)
    if objective_of(config).needs_target:
        return FullStudent(teacher, config, teacher_signs)
    return Student(teacher.train().requires_grad_(True))  # the teacher's own UNet, trained as it is
