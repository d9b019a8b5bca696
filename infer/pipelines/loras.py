"""LoRAs for a pipeline: found, checked, mixed and fused."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.pipelines.students import Student, nearest, student_beside
from shared.errors import UserError
from shared.models.lora_files import read_parts
from shared.networks.styled import check_fits
from shared.style import split_scale
from train.trainer.init_student import PICKLES, lora_at, unet_at

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


def find_lora(text: str, flag: str = FLAG) -> LoraFile:
    """Find what a `FILE[:SCALE]` names: a LoRA's file, or the folder in which a run has one.

    Raises UserError where there is none.
    """
    name, scale = split_scale(text)
    path = Path(name)
    file = lora_at(path)
    if file is None:
        raise UserError(f"{flag} {path} {why_no_lora(path)}")
    return LoraFile(file, scale, student_beside(file))


def why_no_lora(path: Path) -> str:
    """Cause and remedy where a path names no LoRA."""
    if not path.exists():
        return f"is not there{nearest(path)}"
    if path.suffix in PICKLES:
        return "is a pickle, which can run code; give it as .safetensors"
    if path.is_file():
        return "is no .safetensors file, which is what is read"
    if unet_at(path) is not None:
        return f"holds a whole UNet, a model of its own: `infer draw --run {path}` draws with it"
    if (path / "checkpoints").is_dir():
        return f"has no exported LoRA yet; `python -m train export --run {path}` makes one"
    return "holds no LoRA; give a .safetensors file, or a run with a LoRA student"


def load_loras(pipe: Any, loras: Sequence[LoraFile], model: str) -> None:
    """Mix LoRAs into a pipeline's weights, by diffusers' adapters.

    They are fused: beside the layers they would cost as much again as the layers. Raises UserError
    for one that does not fit.
    """
    names = add_adapters(pipe, loras, model)
    if loras:
        pipe.set_adapters(names, [lora.scale for lora in loras])
        parts = [part for part in pipe._lora_loadable_modules if has_adapters(pipe, part)]
        pipe.fuse_lora(components=parts, adapter_names=names)
        pipe.unload_lora_weights()


def adapter_name(number: int) -> str:
    """The name that a pipeline knows a LoRA by."""
    return f"lora{number}"


def add_adapters(pipe: Any, loras: Sequence[LoraFile], model: str) -> list[str]:
    """Give a pipeline an adapter for each LoRA; returns their names. Raises UserError as above."""
    names = [adapter_name(number) for number in range(len(loras))]
    with warnings.catch_warnings():  # peft warns of a second adapter, which is meant
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        for lora, name in zip(loras, names, strict=True):
            load_lora(pipe, lora, name, model)
    return names


def load_lora(pipe: Any, lora: LoraFile, name: str, model: str) -> None:
    """Give a pipeline an adapter of this name. Raises UserError where it does not fit."""
    own, text = read_parts(lora.path, pipe.unet.config)
    check_fits(own, pipe.unet, f"{FLAG} {lora.path}", model)
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
