"""The weight files of an export: a LoRA under two kinds of names, or a UNet in one or two dtypes.

A LoRA's strength, alpha / rank, is multiplied into its `lora_B`, and both files say that alpha is
the rank: whoever reads the weights alone, as a bare state dict, has what was trained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from shared.errors import UserError
from shared.models.fingerprint import fingerprint, tensors_fingerprint
from shared.networks.denoiser import Denoiser
from shared.networks.styled import Lora, join
from shared.storage.files import dump_json, publish, sync_folder
from shared.storage.tensors import read_metadata, tensor_chunks
from train.export.kohya import KOHYA_FILE, kohya_metadata, kohya_tensors

LORA_FILE = "pytorch_lora_weights.safetensors"
UNET_FOLDER = "unet"
Chunks = Iterator[bytes | memoryview]
UNET_FILES = {
    "fp32": "diffusion_pytorch_model.safetensors",
    "fp16": "diffusion_pytorch_model.fp16.safetensors",  # diffusers' variant="fp16"
}
STYLES = "distillery.teacher_lora"  # likewise: what the teacher wore, which is among the weights
STUDENT = "distillery.student"  # in a file's metadata: the fingerprint of what was trained


@dataclass(frozen=True)
class Worn:
    """What the teacher of a LoRA student wears: the weights added, and what tells the styles."""

    lora: Lora = field(default_factory=dict)
    marks: tuple[str, ...] = ()


NOTHING = Worn()


def write_lora(unet: Denoiser, folder: Path, dtype: str, tmp: Path, worn: Worn = NOTHING) -> str:
    """Write diffusers' file and, unless a layer has no name there, kohya's; fp16 if `dtype` is.

    What the teacher wears is in them, beside the student's own ranks: the base model has it not.
    Returns the student's fingerprint, which is in both. diffusers' names stay peft's throughout:
    its own conversion renames the attention layers only, and a file with both kinds of names
    loses half its modules on loading.
    """
    adapter = lora_tensors(unet, worn)
    student = tensors_fingerprint(adapter)
    if dtype == "fp16":
        adapter = halved(adapter)
    told = {STYLES: json.dumps(worn.marks)} if worn.marks else {}
    metadata = {STUDENT: student, **told}
    try:
        chunks = kohya_file(adapter, unet, metadata)
    except UserError as error:
        print(f"note: {KOHYA_FILE} is left out: {error}", file=sys.stderr)
    else:
        publish(chunks, folder / KOHYA_FILE, tmp)
    publish(diffusers_file(adapter, unet, metadata), folder / LORA_FILE, tmp)
    return student


def kohya_file(adapter: Lora, unet: Denoiser, told: Mapping[str, str]) -> Chunks:
    """The bytes of a LoRA's file in kohya's form. Raises UserError for a layer without a name."""
    named = kohya_tensors(adapter, unet)
    return tensor_chunks(named, {**kohya_metadata(unet, named), **told})


def diffusers_file(adapter: Lora, unet: Denoiser, told: Mapping[str, str]) -> Chunks:
    """The bytes of a LoRA's file in diffusers' form."""
    tensors = {f"unet.{name}": tensor for name, tensor in adapter.items()}
    settings = {f"unet.{name}": value for name, value in adapter_config(unet, adapter).items()}
    stored = json.dumps(settings, indent=2, sort_keys=True)
    return tensor_chunks(tensors, {"format": "pt", LORA_ADAPTER_METADATA_KEY: stored, **told})


def lora_tensors(unet: Denoiser, worn: Worn) -> Lora:
    """What a LoRA student adds to the plain model: its own adapter, and what its teacher wears."""
    adapter = folded_adapter(unet)
    return evened(join(worn.lora, adapter)) if worn.marks else adapter


def folded_adapter(unet: Denoiser) -> dict[str, Tensor]:
    """Return peft's tensors, `PATH.lora_A.weight` and `PATH.lora_B.weight`, fp32 on the CPU.

    lora_B @ lora_A is what the adapter adds to a layer: alpha / rank is part of lora_B.
    """
    scaling = {
        path: layer.scaling["default"]
        for path, layer in unet.named_modules()
        if isinstance(layer, LoraLayer)
    }
    folded = {}
    for name, tensor in get_peft_model_state_dict(unet).items():
        path, _, part = name.removesuffix(".weight").rpartition(".")
        values = tensor.detach().float().cpu()
        folded[name] = values * scaling[path] if part == "lora_B" else values
    return folded


def evened(adapter: Lora) -> dict[str, Tensor]:
    """The same LoRA with one rank on all layers: zeros fill what lacks.

    diffusers loses the alphas of kohya's attention layers where they are not all alike.
    """
    rank = max(len(tensor) for name, tensor in adapter.items() if ".lora_A." in name)
    return {
        name: filled(tensor, rank, 0 if ".lora_A." in name else 1)
        for name, tensor in adapter.items()
    }


def filled(tensor: Tensor, length: int, dimension: int) -> Tensor:
    """The same with zeros behind, up to `length` in this dimension."""
    shape = list(tensor.shape)
    shape[dimension] = length - shape[dimension]
    return torch.cat([tensor, tensor.new_zeros(shape)], dimension)


def adapter_config(unet: Denoiser, adapter: Lora) -> dict[str, Any]:
    """The configuration of an adapter of this UNet, all of one rank, as its readers are to have it.

    alpha is the rank, since it is folded; there is no dropout, which diffusers would go on with
    while drawing.
    """
    own = getattr(unet, "peft_config", {}).get("default", LoraConfig(target_modules=[]))
    config: dict[str, Any] = own.to_dict()
    layers = {name.rpartition(".lora_")[0] for name in adapter}
    config["target_modules"] = sorted({*config["target_modules"], *layers})
    rank = next(len(tensor) for name, tensor in adapter.items() if ".lora_A." in name)
    return {**config, "r": rank, "lora_alpha": rank, "lora_dropout": 0.0}


def write_unet(
    unet: Denoiser, folder: Path, dtype: str, tmp: Path, told: Mapping[str, str] | None = None
) -> str:
    """Write a diffusers folder: config.json and the weights in fp32, fp16 or `both`.

    Returns the student's fingerprint, which is in the metadata unless `told` says what is. Where
    the teacher lay is nobody's business.
    """
    config = json.loads(unet.to_json_string())
    config.pop("_name_or_path", None)
    publish([dump_json(config)], folder / UNET_FOLDER / "config.json", tmp)
    student = fingerprint(unet)
    for name, file in UNET_FILES.items():
        if dtype in (name, "both"):
            tensors = unet.state_dict()
            tensors = halved(tensors) if name == "fp16" else tensors
            metadata = {"format": "pt", **({STUDENT: student} if told is None else told)}
            publish(tensor_chunks(tensors, metadata), folder / UNET_FOLDER / file, tmp)
    sync_folder(folder / UNET_FOLDER)
    return student


def halved(
    tensors: Mapping[str, Tensor], remedy: str = "use --export-dtype fp32"
) -> dict[str, Tensor]:
    """The same in fp16. Raises UserError, with the remedy, for a weight too large for it."""
    half = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    for name, tensor in half.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} does not fit into fp16; {remedy}")
    return half


def full_precision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in fp32."""
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def weight_files(kind: str, dtype: str) -> list[str]:
    """The files, in an export's folder, of a `lora` or `full` student of an --export-dtype.

    kohya's is among them, though a LoRA with a layer that has no name there goes without.
    """
    if kind == "lora":
        return [LORA_FILE, KOHYA_FILE]
    return [f"{UNET_FOLDER}/{file}" for name, file in UNET_FILES.items() if dtype in (name, "both")]


def exported_student(folder: Path, kind: str) -> str | None:
    """The fingerprint of the `lora` or `full` student exported in a folder.

    None where there is none, or where an older version wrote it.
    """
    names = [LORA_FILE] if kind == "lora" else [f"{UNET_FOLDER}/{f}" for f in UNET_FILES.values()]
    files = [folder / name for name in names if (folder / name).is_file()]
    return read_metadata(files[0]).get(STUDENT) if files else None
