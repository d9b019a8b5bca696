"""A model with LoRAs in it: a diffusers folder, or one file in the original layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from infer.pipelines.build import quiet, settings, text_parts
from infer.pipelines.sampling import schedulers
from shared.models.family import SCHEDULER_CONFIG, Model, load_config
from shared.models.rescale import plain_vae
from shared.models.vae import load_vae
from shared.models.whole_model import beside_unet
from shared.networks.denoiser import Denoiser, load_unet
from shared.networks.styled import Lora, wear
from shared.storage.files import check_free, guard, move, publish, workshop
from shared.storage.tensors import tensor_chunks
from train.export.standalone import whole_model
from train.export.weights import full_precision, halved

REMEDY = "use --dtype float32"


def merged_unet(model: Model, lora: Lora) -> Denoiser:
    """The model's UNet with the LoRA in its weights, fp32."""
    unet = load_unet(model.source)
    wear(unet, lora)
    return unet


def write_single_file(
    model: Model, lora: Lora, path: Path, half: bool, metadata: Mapping[str, str], tmp: Path
) -> None:
    """Write the whole model as one file. Raises UserError where a part is missing."""
    whole = whole_model(merged_unet(model, lora), beside_unet(model))
    tensors = halved(whole, REMEDY) if half else full_precision(whole)
    publish(tensor_chunks(tensors, {"format": "pt", **metadata}), path, tmp)


def write_folder(model: Model, lora: Lora, folder: Path, half: bool, tmp: Path) -> None:
    """Write the whole model as a diffusers folder, which appears when all of it is there."""
    pipe = pipeline(model, merged_unet(model, lora))
    if half:
        halved(pipe.unet.state_dict(), REMEDY)
        pipe.to(torch.float16)
    with workshop(tmp, "-merged") as building:
        with guard(tmp):
            pipe.save_pretrained(building)
        check_free(folder)
        if folder.exists():
            folder.rmdir()
        move(building, folder)


def pipeline(model: Model, unet: Denoiser) -> Any:
    """Diffusers' pipeline of a model, wherever it is, with this UNet; fp32, without a checker."""
    quiet()
    scheduler = load_config(model.source, SCHEDULER_CONFIG)
    kind = schedulers().get(scheduler.get("_class_name", ""), diffusers.DDIMScheduler)
    return getattr(diffusers, model.family.pipeline)(
        unet=unet,
        vae=plain_vae(load_vae(model.source)),
        scheduler=kind.from_config(scheduler),
        **text_parts(model),
        **settings(model),
    )
