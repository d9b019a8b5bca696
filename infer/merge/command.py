"""`infer merge`: LoRAs become one LoRA, or part of the model that they are for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from infer.config import MergeConfig
from infer.merge.into_model import write_folder, write_single_file
from infer.merge.loras import as_styles, find_loras, find_model
from infer.merge.rank import layers_of, rank_of, reduced, relative_error
from infer.pipelines.loras import LoraFile
from shared.errors import UserError
from shared.models.family import Model, model_name, unet_config
from shared.networks.denoiser import Denoiser
from shared.networks.styled import Lora, read_styles
from shared.storage.files import beside, check_free, publish
from shared.style import marks
from shared.wording import counted, size_of
from train.export.weights import diffusers_file, evened, halved, kohya_file

MERGED = "distillery.merged"  # in a file's metadata: what was merged, by hash and scale
WHOLE = {"folder": "a diffusers folder", "single-file": "one file in the original layout"}
BYTES = {"float32": 4, "float16": 2}


def merge(config: MergeConfig) -> None:
    """Say what will be merged, do it, and print where it is.

    Raises UserError for LoRAs that do not fit the model or cannot be read, before anything is
    written.
    """
    loras = find_loras(config.loras)
    model = find_model(config.model, loras)
    output = where(config)
    unet = architecture(model)
    styles = as_styles(loras)
    joined = read_styles(styles, unet, "the LoRA", model_name(model.source))
    print(plan(config, loras, model, joined, output), file=sys.stderr)
    lora = joined
    if config.rank is not None:
        lora = reduced(joined, config.rank)
    told = {MERGED: json.dumps(marks(styles))}
    with beside(output) as tmp:
        written = write(config, told, model, unet, lora, output, tmp)
    if config.rank is not None:
        error = relative_error(joined, written)
        print(f"rank {config.rank}: relative error {error:.3g}", file=sys.stderr)
    print(output)


def where(config: MergeConfig) -> Path:
    """The path to write. Raises UserError for one that cannot be it."""
    if config.form == "folder":
        folder = config.output or Path("merged")
        check_free(folder)
        return folder
    file = config.output or Path("merged.safetensors")
    if file.suffix != ".safetensors":
        raise UserError(f"--output {file}: a file's name ends with .safetensors; choose such a one")
    return file


def architecture(model: Model) -> Denoiser:
    """A model's UNet without memory behind its weights."""
    with torch.device("meta"):
        unet: Denoiser = Denoiser.from_config(unet_config(model.source))
    return unet


def plan(
    config: MergeConfig, loras: Sequence[LoraFile], model: Model, joined: Lora, output: Path
) -> str:
    """What will be done, in a line."""
    name = model_name(model.source)
    begun = f"merging {', '.join(map(str, loras))}"
    if config.form in WHOLE:
        return f"{begun} into {name}, as {WHOLE[config.form]} in {config.dtype}: {output}"
    rank = rank_of(joined) if config.rank is None else min(config.rank, rank_of(joined))
    values = sum(tensor.numel() // tensor_rank(key, tensor) for key, tensor in joined.items())
    layers = counted(len(layers_of(joined)), "layer")
    size = size_of(values * rank * BYTES[config.dtype])
    kind = f"a LoRA of {layers} and rank {rank} in the form of {config.form}"
    return f"{begun} for {name}, as {kind}, about {size}: {output}"


def tensor_rank(name: str, tensor: torch.Tensor) -> int:
    """The rank of a matrix of a LoRA."""
    return len(tensor) if ".lora_A." in name else tensor.shape[1]


def write(
    config: MergeConfig,
    told: Mapping[str, str],
    model: Model,
    unet: Denoiser,
    lora: Lora,
    output: Path,
    tmp: Path,
) -> Lora:
    """Write what was asked for; returns what is added to the model, rounded as it is written."""
    half = config.dtype == "float16"
    if config.form == "folder":
        write_folder(model, lora, output, half, tmp)
    elif config.form == "single-file":
        write_single_file(model, lora, output, half, told, tmp)
    else:
        # diffusers wants one rank on all layers, and loses alphas otherwise.
        lora = halved(evened(lora), "use --dtype float32") if half else evened(lora)
        build = kohya_file if config.form == "kohya" else diffusers_file
        publish(build(lora, unet, told), output, tmp)
    return lora
