"""A model's pipeline with LoRAs that stay beside its weights, so that their shares can change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infer.config import LearnFlags, ModelFlags
from infer.pipelines.build import load_pipeline, pick_dtype
from infer.pipelines.choose import choose
from infer.pipelines.loras import LoraFile, adapter_name, add_adapters
from shared.machine.device import pick_device
from shared.models.family import Model
from shared.networks.denoiser import Denoiser, load_unet
from train.export.weights import LORA_FILE


def load_with_adapters(flags: LearnFlags, runs: Sequence[Path]) -> Any:
    """The stock pipeline of a model, with the LoRAs of runs as adapters that are off."""
    device = pick_device(flags.device)
    dtype = pick_dtype(flags.dtype, device)
    choice = choose(ModelFlags(model=flags.model, vae=flags.vae))
    pipe = load_pipeline(choice, device, dtype)
    add_adapters(pipe, [LoraFile(run / LORA_FILE) for run in runs], choice.model.source)
    pipe.to(device, dtype)
    share(pipe, [0.0] * len(runs))
    return pipe


def bare_unet(flags: LearnFlags, model: Model) -> Denoiser:
    """The UNet as it will compute, to be timed."""
    device = pick_device(flags.device)
    return load_unet(model.source, pick_dtype(flags.dtype, device)).to(device)


def share(pipe: Any, shares: Sequence[float]) -> None:
    """Let each LoRA count for so much of itself: what they add to a layer is added up."""
    if shares:
        pipe.set_adapters([adapter_name(number) for number in range(len(shares))], list(shares))
