"""LoRAs for a pipeline: found, checked, mixed and fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.pipelines.students import Student, nearest, open_student, student_beside
from shared.errors import UserError
from shared.models.lora_files import read_parts
from shared.networks.styled import misfit
from shared.style import split_scale

FLAG = "--lora"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA on disk, with the factor by which it counts."""

    path: Path
    scale: float = 1.0
    student: Student | None = None  # whose export it is

    def __str__(self) -> str:
        name = self.path.name if self.student is None else self.student.folder.name
        return f"{name} at {self.scale:g}"


def find_lora(text: str) -> LoraFile:
    """Find what a `--lora FILE[:SCALE]` names: a file, or the folder of a LoRA student.

    Raises UserError where there is none.
    """
    name, scale = split_scale(text)
    path = Path(name)
    if path.is_dir():
        student = open_student(path, FLAG)
        if not student.lora:
            raise UserError(
                f"{FLAG} {path} is the run of a full student, which is a model of its own: "
                f"--run {path}"
            )
        return LoraFile(student.weights, scale, student)
    if not path.is_file():
        raise UserError(f"{FLAG} {path} is not there{nearest(path)}")
    if path.suffix != ".safetensors":
        raise UserError(f"{FLAG} {path} is no .safetensors file, which is what is read")
    return LoraFile(path, scale, student_beside(path))


def load_loras(pipe: Any, loras: Sequence[LoraFile], model: str) -> None:
    """Mix LoRAs into a pipeline's weights, by diffusers' adapters.

    They are fused: beside the layers they would cost as much again as the layers. Raises UserError
    for one that does not fit.
    """
    names = [f"lora{number}" for number in range(len(loras))]
    for lora, name in zip(loras, names, strict=True):
        load_lora(pipe, lora, name, model)
    if loras:
        pipe.set_adapters(names, [lora.scale for lora in loras])
        parts = [part for part in pipe._lora_loadable_modules if has_adapters(pipe, part)]
        pipe.fuse_lora(components=parts, adapter_names=names)
        pipe.unload_lora_weights()


def load_lora(pipe: Any, lora: LoraFile, name: str, model: str) -> None:
    """Give a pipeline an adapter of this name. Raises UserError where it does not fit."""
    own, text = read_parts(lora.path, pipe.unet.config)
    if layer := misfit(own, pipe.unet):
        raise UserError(
            f"{FLAG} {lora.path} is of another model than {model}: its layer {layer} does not fit; "
            "give a LoRA made for this kind of model"
        )
    unet = {f"unet.{layer}": tensor for layer, tensor in own.items()}
    pipe.load_lora_weights(unet, adapter_name=name)
    for part in ("text_encoder", "text_encoder_2"):
        tensors = {key: value for key, value in text.items() if key.startswith(f"{part}.")}
        if not tensors:
            continue
        encoder = getattr(pipe, part, None)
        if encoder is None:
            raise UserError(
                f"{FLAG} {lora.path} adapts a {part}, which {model} has not; give a LoRA made for "
                "this kind of model"
            )
        pipe.load_lora_into_text_encoder(
            tensors, None, encoder, prefix=part, adapter_name=name, _pipeline=pipe
        )


def has_adapters(pipe: Any, part: str) -> bool:
    """Has a part of a pipeline adapters that can be fused?"""
    return bool(getattr(getattr(pipe, part, None), "peft_config", None))
