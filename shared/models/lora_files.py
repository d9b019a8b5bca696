"""LoRA files of this project and of others, read under one kind of names."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from torch import Tensor

from shared.errors import UserError, first_line
from shared.models.weights import UNUSABLE, is_finite
from shared.storage.tensors import load_tensors, read_metadata

PARTS = ("lora_A", "lora_B")
REMEDY = "give another file"


def read_lora(path: Path, unet_config: Any) -> dict[str, Tensor]:
    """A LoRA in diffusers' or kohya's form as `LAYER.lora_A.weight` and `LAYER.lora_B.weight`.

    Layers have diffusers' names, values are fp32, and lora_B @ lora_A is what is added to a layer:
    alpha / rank is part of lora_B. `unet_config` is that of the model's UNet. Adapters of text
    encoders are left out, with a note. Raises UserError for what is no LoRA of a UNet.
    """
    own, text = read_parts(path, unet_config)
    if text:
        note_text_encoders(path)
    return own


def read_parts(path: Path, unet_config: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA's part for the UNet, as `read_lora` has it, and that for text encoders.

    The latter's names begin with `text_encoder.` or `text_encoder_2.`, and are such as diffusers'
    `load_lora_into_text_encoder` takes; alpha / rank is part of it, too.
    """
    tensors = load_tensors(path, REMEDY)
    if odd := [name for name in tensors if "dora" in name or "magnitude" in name]:
        raise UserError(f"{path} holds {odd[0]}, which is of a DoRA, no LoRA; {REMEDY}")
    try:
        if all(name.startswith("lora_") for name in tensors):
            tensors = folded_kohya(tensors)
        named, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(
            dict(tensors), unet_config=unet_config
        )
    except UNUSABLE as error:
        raise UserError(
            f"{path} is no LoRA that diffusers knows ({first_line(error)}); {REMEDY}"
        ) from None
    own = {k.removeprefix("unet."): v for k, v in named.items() if k.startswith("unet.")}
    if not any(".lora_A." in name for name in own):
        own = convert_unet_state_dict_to_peft(own)
    check_pairs(path, own)
    text = dict[str, Tensor]()
    for part in ("text_encoder", "text_encoder_2"):
        its = {name: value for name, value in named.items() if name.startswith(f"{part}.")}
        text |= folded(its, adapter_settings(path, part))
    return folded(own, adapter_settings(path)), text


@cache
def note_text_encoders(path: Path) -> None:
    """Say what is left out of a file, once."""
    print(f"note: {path} adapts text encoders too, which are left as they are", file=sys.stderr)


def folded_kohya(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kohya's tensors with alpha / rank multiplied into `lora_up`, and no alpha."""
    found = {}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".")
        down, alpha = tensors.get(f"{layer}.lora_down.weight"), tensors.get(f"{layer}.alpha")
        if part == "lora_up.weight" and down is not None and alpha is not None:
            tensor = tensor.float() * (alpha.item() / len(down))
        if part != "alpha":
            found[name] = tensor
    return found


def adapter_settings(path: Path, part: str = "unet") -> dict[str, Any]:
    """Peft's configuration of a part's adapter in diffusers' metadata; empty where there is none.

    Raises UserError for what is not JSON.
    """
    try:
        stored = json.loads(read_metadata(path).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        prefix = f"{part}."
        own = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
        alphas = own.get("alpha_pattern") or {}
        numbers = {name: float(alpha) for name, alpha in alphas.items()}
        usual = {name: float(own[name]) for name in own if name == "lora_alpha"}
        return {**own, **usual, "alpha_pattern": numbers}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: its metadata cannot be read; {REMEDY}") from None


def folded(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Peft's tensors in fp32, with alpha / rank multiplied into `lora_B`."""
    alphas: dict[str, float] = settings.get("alpha_pattern", {})
    found = {}
    for name, tensor in tensors.items():
        layer, part = split(name)
        values = tensor.float()
        if part == "lora_B":
            rank = tensor.shape[1]
            usual: float = settings.get("lora_alpha", rank)
            alpha = alphas.get(get_pattern_key(list(alphas), layer), usual)
            values = values * (alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))
        found[name] = values
    return found


def split(name: str) -> tuple[str, str]:
    """A tensor's layer and part: `mid_block.x` and `lora_A`."""
    layer, _, part = name.removesuffix(".weight").rpartition(".")
    return layer, part


def check_pairs(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError unless there are matrices in pairs, of one rank, finite, and nothing else."""
    if not tensors:
        raise UserError(f"{path} holds no LoRA of a UNet; {REMEDY}")
    for name, tensor in tensors.items():
        layer, part = split(name)
        if part not in PARTS or not name.endswith(".weight"):
            raise UserError(f"{path} holds {name}, which is no LoRA's; {REMEDY}")
        down, up = (tensors.get(f"{layer}.{one}.weight") for one in PARTS)
        whole = down is not None and up is not None and min(down.ndim, up.ndim) > 1
        if not whole or len(down) != up.shape[1]:  # type: ignore[arg-type, union-attr]
            raise UserError(f"{path}: {layer} has no pair of matrices of one rank; {REMEDY}")
        if not (tensor.is_floating_point() and is_finite(tensor)):
            raise UserError(f"{path}: {name} holds numbers that are not finite; {REMEDY}")
