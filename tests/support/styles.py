"""Style LoRAs of the tiny models, in the forms in which people have them."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from tests.support.students import disturb, stock_unet

RANK, ALPHA = 3, 6.0
TARGETS = ("to_q", "to_k", "conv1", "conv_in")


def style_unet(model: Path, seed: int = 5) -> UNet2DConditionModel:
    """A stock UNet with random adapters, convolutions among them."""
    unet = stock_unet(model)
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
    disturb((p for p in unet.parameters() if p.requires_grad), seed, 0.15)
    return unet.requires_grad_(False)


def write_style(model: Path, path: Path, form: str = "diffusers", seed: int = 5, **more) -> Path:
    """The adapters of `style_unet` as a file; `more` tensors beside them."""
    unet = style_unet(model, seed)
    layers = get_peft_model_state_dict(unet)
    if form == "kohya":  # as sd-scripts names the layers of SD 1.x, with its alpha
        tensors = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in layers.items()})
        scaled = {k: torch.tensor(ALPHA) if k.endswith(".alpha") else v for k, v in tensors.items()}
        save_file({k: v.contiguous() for k, v in (scaled | more).items()}, path)
        return path
    metadata = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()}
    StableDiffusionPipeline.save_lora_weights(
        path.parent, unet_lora_layers=layers, weight_name=path.name, **metadata
    )
    return path
