"""Models written as one file in the original Stable Diffusion layout.

diffusers reads that layout and does not write it, so this is the inverse of its reader, which the
tests ask whether it is right.
"""

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from train.export.kohya import original_path

Tensors = dict[str, torch.Tensor]


def original_unet(unet: UNet2DConditionModel) -> Tensors:
    tables = DIFFUSERS_TO_LDM_MAPPING["unet"]
    known = tables["layers"] | tables["addition_embed_type"]
    found = {}
    for name, tensor in unet.state_dict().items():
        if name in known:
            new = known[name]
        else:
            path, _, kind = name.rpartition(".")
            new = f"{original_path(path, unet.config.layers_per_block)}.{kind}"
            if ".2.conv." in new and without_attention(unet, name):
                new = new.replace(".2.conv.", ".1.conv.")
        found[f"model.diffusion_model.{new}"] = tensor
    return found


def without_attention(unet: UNet2DConditionModel, name: str) -> bool:
    return not hasattr(unet.up_blocks[int(name.split(".")[1])], "attentions")


def original_vae(vae: AutoencoderKL) -> Tensors:
    known = DIFFUSERS_TO_LDM_MAPPING["vae"]
    top = len(vae.config.up_block_types) - 1
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    found = {}
    for name, tensor in vae.state_dict().items():
        new = known.get(name, name)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{top - int(m[1])}", new)
        new = new.replace("down_blocks.", "down.").replace("resnets.", "block.")
        new = new.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        new = new.replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0." in new:
            new = new.replace("mid_block.attentions.0.", "mid.attn_1.")
            for theirs, ours in attention.items():
                new = new.replace(f"attn_1.{theirs}.", f"attn_1.{ours}.")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]  # a convolution then
        found[f"first_stage_model.{new}"] = tensor
    return found


def original_clip(encoder: CLIPTextModel, prefix: str) -> Tensors:
    """As OpenAI's CLIP lies in SD 1.x and as SDXL's first encoder."""
    names = {name: tensor for name, tensor in encoder.state_dict().items()}
    return {f"{prefix}text_model.{n.removeprefix('text_model.')}": t for n, t in names.items()}


def original_open_clip(encoder: CLIPTextModelWithProjection, prefix: str) -> Tensors:
    """As OpenCLIP lies in SDXL's second encoder: q, k and v in one matrix."""
    tables = DIFFUSERS_TO_LDM_MAPPING["openclip"]
    found, rows = {}, {}
    for name, tensor in encoder.state_dict().items():
        if name in tables["layers"]:
            new = tables["layers"][name]
            found[new] = tensor.T.contiguous() if new == "text_projection" else tensor
            continue
        new = "transformer." + name
        for theirs, original in list(tables["transformer"].items())[:6]:
            new = new.replace(theirs, original)
        if match := re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", new):
            rows.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
        else:
            found[new] = tensor
    found |= {name: torch.cat([part["q"], part["k"], part["v"]]) for name, part in rows.items()}
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


def write_single_file(pipe, path: Path) -> Path:
    """A Stable Diffusion or SDXL pipeline as one file."""
    tensors = original_unet(pipe.unet) | original_vae(pipe.vae)
    if hasattr(pipe, "text_encoder_2"):
        tensors |= original_clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= original_open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        tensors |= original_clip(pipe.text_encoder, "cond_stage_model.transformer.")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path
