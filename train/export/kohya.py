"""A LoRA under the names that kohya's sd-scripts, ComfyUI and AUTOMATIC1111 know.

A module is `lora_unet_` and its path with underscores; its tensors are `lora_down.weight`,
`lora_up.weight` and `alpha`. For SD 1.x and 2.x the path is diffusers' own. For SDXL it is that of
the original checkpoint, where blocks are counted through: `input_blocks.4.1` for
`down_blocks.1.attentions.0`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from diffusers.utils import convert_state_dict_to_kohya
from torch import Tensor

from shared.errors import UserError
from shared.networks.denoiser import Denoiser

KOHYA_FILE = "kohya_lora_weights.safetensors"
OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def kohya_metadata(unet: Denoiser, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What sd-scripts writes of a LoRA; web UIs sort by `ss_base_model_version` and `ss_v2`.

    alpha is the rank: what it was in training is part of the weights.
    """
    own = unet.peft_config["default"].r
    ranks = (len(tensor) for name, tensor in tensors.items() if ".lora_down." in name)
    rank = str(next(ranks, own))  # with what a teacher wore it is larger than the student's own
    v2 = unet.config.cross_attention_dim == 1024
    base = "sd_v2" if v2 else "sd_v1"
    if unet.config.addition_embed_type == "text_time":
        base = "sdxl_base_v1-0"
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_base_model_version": base,
        "ss_v2": str(v2),
    }
    if any(tensor.ndim == 4 and tensor.shape[-1] > 1 for tensor in tensors.values()):
        metadata["ss_network_args"] = json.dumps({"conv_dim": rank, "conv_alpha": rank})
    return metadata


def kohya_tensors(adapter: Mapping[str, Tensor], unet: Denoiser) -> dict[str, Tensor]:
    """Rename peft's tensors of a UNet (`PATH.lora_A.weight`, `PATH.lora_B.weight`) as kohya's are.

    Every `alpha` is its module's rank, so that a strength of 1 is what the weights say. For SDXL,
    paths become those of the original checkpoint; raises UserError for one that has no
    counterpart there.
    """
    renamed = {}
    for name, tensor in adapter.items():
        path, _, part = name.partition(".lora_")
        if unet.config.addition_embed_type == "text_time":
            path = original_path(path, unet.config.layers_per_block)
        renamed[f"unet.{path}.lora_{part}"] = tensor
    tensors: dict[str, Tensor] = convert_state_dict_to_kohya(renamed)
    return {name: t.float() if name.endswith(".alpha") else t for name, t in tensors.items()}


def original_path(path: str, layers_per_block: int) -> str:
    """A module of a UNet: from its diffusers path to that of the original checkpoint.

    `input_blocks.0` is conv_in; then each down block counts its layers and its downsampler, each up
    block its layers, one more than below. A layer's parts are 0 the resnet, 1 the attention (where
    there is one), then the upsampler; the upsampler of an up block without attention is its 1,
    which no SDXL has. Raises UserError for what the original does not have.
    """
    if path in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[path]
    parts = path.split(".")
    if parts[0] not in ("down_blocks", "mid_block", "up_blocks"):
        raise UserError(f"the original SDXL has no layer {path}")
    if parts[0] == "mid_block":
        kind, number, rest = parts[1], int(parts[2]), parts[3:]
        block = f"middle_block.{2 * number if kind == 'resnets' else 1}"
        return ".".join([block, *_inner(kind, rest)])
    level, kind, number, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
    if parts[0] == "down_blocks":
        first = 1 + level * (layers_per_block + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers_per_block}.0.op"
        block = f"input_blocks.{first + number}"
    else:
        first = level * (layers_per_block + 1)
        if kind == "upsamplers":
            return f"output_blocks.{first + layers_per_block}.2.conv"
        block = f"output_blocks.{first + number}"
    return ".".join([block, "0" if kind == "resnets" else "1", *_inner(kind, rest)])


def _inner(kind: str, rest: list[str]) -> list[str]:
    return [RESNET_PARTS[rest[0]]] if kind == "resnets" else rest
