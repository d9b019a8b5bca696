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

from shared.models.original_layout import original_path
from shared.networks.denoiser import Denoiser

KOHYA_FILE = "kohya_lora_weights.safetensors"


def kohya_metadata(unet: Denoiser, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What sd-scripts writes of a LoRA; web UIs sort by `ss_base_model_version` and `ss_v2`.

    alpha is the rank: what it was in training is part of the weights.
    """
    ranks = (len(tensor) for name, tensor in tensors.items() if ".lora_down." in name)
    rank = str(next(ranks))
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
