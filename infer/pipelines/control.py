"""ControlNets, loaded and checked against the model that they steer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel

from shared.errors import UserError, first_line
from shared.models.hub import unreachable
from shared.models.single_file import is_single_file
from shared.models.weights import UNUSABLE, check_finite, load_whole

FLAG = "--controlnet"
FITTING = ("cross_attention_dim", "addition_embed_type", "block_out_channels")


def load_controlnet(source: str, unet_config: Any, dtype: torch.dtype) -> ControlNetModel:
    """Load a ControlNet for a UNet of this configuration, frozen.

    Raises UserError where there is none, or where it is of another model.
    """
    if is_single_file(source):
        network = from_single_file(source, dtype)
    else:
        if not Path(source).is_dir():
            if source.count("/") != 1:
                raise UserError(
                    f"{FLAG} {source!r} is neither a folder here nor a hub id (owner/name)"
                )
            unreachable()  # with no hub, only what was downloaded before is looked for
        network = load_whole(
            ControlNetModel.from_pretrained, source, "ControlNet",
            torch_dtype=dtype, use_safetensors=True,
        )  # fmt: skip
    for name in FITTING:
        theirs, ours = network.config.get(name), unet_config.get(name)
        if str_of(theirs) != str_of(ours):
            raise UserError(
                f"{FLAG} {source} is for another model: its {name} is {str_of(theirs)}, the UNet's "
                f"{str_of(ours)}; give one made for this kind of model"
            )
    return network.eval().requires_grad_(False)


def from_single_file(source: str, dtype: torch.dtype) -> ControlNetModel:
    """Load one from a file in the layout of its original code."""
    unreachable()  # its configuration is the hub's
    try:
        network = ControlNetModel.from_single_file(source, torch_dtype=dtype)
    except UNUSABLE as error:
        raise UserError(
            f"{FLAG} {source}: no ControlNet can be read from it ({first_line(error)}); give a "
            "diffusers folder"
        ) from None
    return check_finite(network, source, "ControlNet")


def str_of(value: Any) -> str:
    """A setting as text, however its list was kept."""
    return str(list(value)) if isinstance(value, list | tuple) else str(value)
