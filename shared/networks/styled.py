"""A teacher that wears style LoRAs: they become part of its weights when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.networks.denoiser import Denoiser, load_unet
from shared.style import FLAG, Style

Lora = Mapping[str, Tensor]  # LAYER.lora_A.weight, LAYER.lora_B.weight; their product is added


def load_teacher(source: str, styles: Sequence[Style] = ()) -> Denoiser:
    """A model's UNet with its styles, frozen. Raises UserError for a style that does not fit."""
    unet = load_unet(source)
    if styles:
        wear(unet, read_styles(styles, unet))
    return unet


def read_styles(
    styles: Sequence[Style], unet: Denoiser, label: str = FLAG, model: str = "the teacher"
) -> Lora:
    """Read styles as one LoRA for this UNet, their scales multiplied in; nothing without any.

    The UNet may have adapters of its own, and needs no weights. Raises UserError, which names the
    `label` and the `model`, for a style of another model, and for a scale with which it overflows.
    """
    from shared.models.lora_files import read_lora  # with all that diffusers knows of LoRAs

    joined: Lora = {}
    for style in styles:
        name = f"{label} {style.file}"
        tensors = check_fits(read_lora(Path(style.file), unet.config), unet, name, model)
        tensors = scaled(tensors, style.scale)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(f"{name} overflows at scale {style.scale:g}; give a smaller one")
        joined = join(joined, tensors)
    return joined


def check_fits(lora: Lora, unet: Denoiser, name: str, model: str) -> Lora:
    """The same LoRA. Raises UserError, which names both, where it is of another than this model."""
    if layer := misfit(lora, unet):
        raise UserError(
            f"{name} is of another model than {model}: its layer {layer} does not fit; give a LoRA "
            "made for this kind of model"
        )
    return lora


def scaled(lora: Lora, scale: float) -> dict[str, Tensor]:
    """One LoRA that adds `scale` times what this one adds."""
    return {name: t * scale if ".lora_B." in name else t for name, t in lora.items()}


def join(one: Lora, other: Lora) -> dict[str, Tensor]:
    """One LoRA that adds what both add: on layers that both adapt the ranks stand side by side."""
    found = {**one, **other}
    for name in one.keys() & other.keys():
        dimension = 0 if ".lora_A." in name else 1
        found[name] = torch.cat([one[name], other[name]], dimension)
    return found


def misfit(tensors: Lora, unet: Denoiser) -> str | None:
    """The first layer of a LoRA whose pair of matrices fits none of the UNet's; None if all do."""
    layers = {
        name.removesuffix(".base_layer"): module.weight.shape
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    for name in tensors:
        layer = name.rpartition(".lora_")[0]
        down, up = (tensors[f"{layer}.{part}.weight"] for part in ("lora_A", "lora_B"))
        product = (len(up), *down.shape[1:]) if up[0, 0].numel() == 1 else None
        if layer not in layers or product != layers[layer]:
            return layer
    return None


@torch.no_grad()
def wear(unet: Denoiser, lora: Lora) -> None:
    """Add to each layer's weights what the LoRA adds to its output."""
    layers = dict(unet.named_modules())
    for name, down in lora.items():
        if ".lora_A." in name:
            up = lora[name.replace(".lora_A.", ".lora_B.")]
            weight = layers[name.rpartition(".lora_")[0]].weight
            weight.add_((up.flatten(1) @ down.flatten(1)).reshape(weight.shape))
