"""Files of tensors, and whether they are what is expected of them before any is used."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shared.errors import UserError
from shared.models.weights import is_finite
from shared.storage.tensors import load_tensors

Shapes = Mapping[str, Sequence[int]]


def is_whole(path: Path) -> bool:
    """Is it a file of tensors, and as long as its header says?"""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def check_tensors(path: Path, found: Mapping[str, Tensor], wanted: Shapes, remedy: str) -> None:
    """Raise UserError, naming file and tensor, unless the file holds just these, whole and finite.

    Whole means of the shape that is wanted: torch would spread a single number over any weight.
    """
    if missing := [name for name in wanted if name not in found]:
        raise UserError(
            f"{path} lacks {len(missing)} of {len(wanted)} tensors, {missing[0]} first; {remedy}"
        )
    if extra := [name for name in found if name not in wanted]:
        raise UserError(f"{path} holds {extra[0]}, which nothing here is named; {remedy}")
    for name, tensor in found.items():
        if wrong := fault(tensor, wanted[name]):
            raise UserError(f"{path}: {name} {wrong}; {remedy}")


def fault(tensor: Tensor, shape: Sequence[int], whole: bool = False) -> str:
    """What is wrong with a tensor of weights or averages, or an empty string.

    `whole` allows whole numbers, which bitsandbytes' averages are.
    """
    if list(tensor.shape) != list(shape):
        return f"has shape {list(tensor.shape)}, not {list(shape)}"
    if not (whole or tensor.is_floating_point()):
        return f"holds {str(tensor.dtype).removeprefix('torch.')}, no floating-point numbers"
    return "" if is_finite(tensor) else "holds numbers that are not finite"


def check_moments(
    path: Path, found: Mapping[str, Tensor], parameters: Shapes, names: Sequence[str], remedy: str
) -> None:
    """Raise UserError, naming file and tensor, for an optimizer's state that is not whole.

    Each parameter has a `step`, and averages of its own shape by the `names`. What else there is,
    such as bitsandbytes' tables, has shapes of its own.
    """
    for parameter, shape in parameters.items():
        for name in ("step", *names):
            key = f"{parameter}/{name}"
            if key not in found:
                raise UserError(f"{path} lacks {key}; {remedy}")
            tensor, one = found[key], name == "step" and found[key].numel() == 1
            eight_bit = name.startswith("state")
            if wrong := fault(tensor, tensor.shape if one else shape, whole=one or eight_bit):
                raise UserError(f"{path}: {key} {wrong}; {remedy}")
    if extra := [key for key in found if key.rpartition("/")[0] not in parameters]:
        raise UserError(f"{path} holds {extra[0]}, which nothing here is named; {remedy}")


def check_lora(path: Path, unet: nn.Module) -> None:
    """Raise UserError unless a LoRA file fits this network: diffusers would draw without it.

    Every tensor belongs to a layer that is there, in a pair that fits the layer; and every layer
    that the file says it adapts has its pair.
    """
    remedy = "run `python -m train export` again"
    found = load_tensors(path, remedy)
    layers = {
        name: layer.weight.shape
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    adapted = {name.removeprefix("unet.").rpartition(".lora_")[0] for name in found}
    ends = targets_of(path)
    named = {name for name in layers for end in ends if f".{name}".endswith(f".{end}")}
    wanted: dict[str, Sequence[int]] = {}
    for name in sorted(adapted | named):
        if name not in layers:
            raise UserError(f"{path} is for layers that the model's UNet has not; {remedy}")
        width_out, width_in, *kernel = layers[name]
        down, up = f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"
        rank = len(found[down]) if down in found and found[down].ndim else 0
        wanted[down] = (max(rank, 1), width_in, *kernel)
        wanted[up] = (width_out, max(rank, 1), *(1 for _ in kernel))
    if not wanted:
        raise UserError(f"{path} holds no LoRA; {remedy}")
    check_tensors(path, found, wanted, remedy)


def targets_of(path: Path) -> set[str]:
    """Ends of the names of the layers that a LoRA file's own metadata names, if it does."""
    with safe_open(path, "pt") as file:
        settings = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    with contextlib.suppress(ValueError, RecursionError):
        names = json.loads(settings)["unet.target_modules"]
        return {str(name) for name in names}
    return set()
