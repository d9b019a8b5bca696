"""The names that weights have in one file of the original Stable Diffusion code.

ComfyUI, AUTOMATIC1111 and sd-scripts open such files; diffusers reads them and writes none. The
UNet lies under `model.diffusion_model.`, the VAE under `first_stage_model.`, each text encoder
under a prefix of its family's. What goes in has diffusers' and transformers' names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from shared.errors import UserError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
OPEN_CLIP = ".model."  # the end of a prefix under which a text encoder lies as OpenCLIP's do
OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
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
VAE_PARTS = (  # (a pattern, what replaces it), in this order
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.down_blocks\.", ".down."),
    (r"\.resnets\.", ".block."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)
CLIP_PARTS = (
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
LAST_BUT_ONE, LAST = "transformer.resblocks.22.", "transformer.resblocks.23."  # of SD 2's encoder


def original_model(
    unet: Mapping[str, Tensor],
    vae: Mapping[str, Tensor],
    encoders: Mapping[str, Mapping[str, Tensor]],
    layers_per_block: int,
) -> dict[str, Tensor]:
    """Return a whole model's weights as its one file has them; `encoders` by their prefixes.

    Raises UserError for a UNet with a layer that the original does not have.
    """
    found = original_unet(unet, layers_per_block) | original_vae(vae)
    for prefix, encoder in encoders.items():
        found |= original_encoder(encoder, prefix)
    return found


def original_unet(tensors: Mapping[str, Tensor], layers_per_block: int) -> dict[str, Tensor]:
    """Return a UNet's weights. Raises UserError for one that the original does not have."""
    attentive = {name.split(".")[1] for name in tensors if re.match(r"up_blocks\.\d+\.att", name)}
    levels = {name.split(".")[1] for name in tensors if name.startswith("up_blocks.")}
    found = {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        new = original_path(path, layers_per_block, levels - attentive)
        found[f"{UNET}{new}.{kind}"] = tensor
    return found


def original_path(path: str, layers_per_block: int, plain: Collection[str] = ()) -> str:
    """A module of a UNet: from its diffusers path to that of the original checkpoint.

    `input_blocks.0` is conv_in; then each down block counts its layers and its downsampler, each up
    block its layers, one more than below. A layer's parts are 0 the resnet, 1 the attention (where
    there is one), then the upsampler. `plain` are the numbers of up blocks without attention, which
    have no upsampler in SDXL. Raises UserError for what the original does not have.
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
            part = 1 if parts[1] in plain else 2
            return f"output_blocks.{first + layers_per_block}.{part}.conv"
        block = f"output_blocks.{first + number}"
    return ".".join([block, "0" if kind == "resnets" else "1", *_inner(kind, rest)])


def _inner(kind: str, rest: list[str]) -> list[str]:
    return [RESNET_PARTS[rest[0]]] if kind == "resnets" else rest


def original_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an AutoencoderKL's weights: up blocks count from the pictures' end there.

    Its attention's projections are convolutions of one pixel there.
    """
    numbers = [int(n[1]) for name in tensors if (n := re.match(r"decoder\.up_blocks\.(\d+)", name))]
    top = max(numbers)
    found = {}
    for name, tensor in tensors.items():
        new = re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up.{top - int(m[1])}.", name)
        new = renamed(new, VAE_PARTS)
        if ".attn_1." in new and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        found[VAE + new] = tensor
    return found


def original_encoder(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return a text encoder's weights under its prefix, which tells OpenAI's CLIP from OpenCLIP."""
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    bare.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: older files have it
    if prefix.endswith(OPEN_CLIP):
        return {prefix + name: tensor for name, tensor in open_clip(bare).items()}
    return {f"{prefix}text_model.{name}": tensor for name, tensor in bare.items()}


def open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a CLIP text encoder's weights as OpenCLIP has them: q, k and v in one matrix.

    SD 2 reads the last layer but one, and diffusers' folders end with it. The original has one
    more, whose place a copy takes: nothing that it says is used.
    """
    found: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        new = renamed(name, CLIP_PARTS)
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        elif match := re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", new):
            joined.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
        else:
            found[new] = tensor
    found |= {name: torch.cat([part[one] for one in "qkv"]) for name, part in joined.items()}
    if any(name.startswith(LAST_BUT_ONE) for name in found) and "text_projection" not in found:
        found |= {
            name.replace(LAST_BUT_ONE, LAST): tensor
            for name, tensor in found.items()
            if name.startswith(LAST_BUT_ONE)
        }
    return found


def renamed(name: str, parts: Sequence[tuple[str, str]]) -> str:
    """Return a name with every pattern replaced in turn."""
    for pattern, replacement in parts:
        name = re.sub(pattern, replacement, name)
    return name
