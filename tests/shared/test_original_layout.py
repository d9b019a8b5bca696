"""The original layout, read back by diffusers' own converters at the size of the real models."""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from shared.errors import UserError
from shared.models.family import FAMILIES
from shared.models.original_layout import original_encoder, original_unet, original_vae
from shared.models.single_file import CONFIGS
from tests.support.models import SD15, SD21, SDXL, weightless

PUBLISHED = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
UNET_KEYS = {"sd15": 686, "sd21": 686, "sdxl": 1680}  # of the published checkpoints
# Names as the published checkpoints have them, one of each kind.
KNOWN = {
    "sd15": {
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (320, 320),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),  # no attention in this block
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,),
        "time_embed.2.bias": (1280,),
        "out.0.weight": (320,),
        "out.2.weight": (4, 320, 3, 3),
    },
    "sdxl": {
        "input_blocks.7.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.8.0.emb_layers.1.bias": (320,),
        "label_emb.0.0.weight": (1280, 2816),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_weight_of_a_unet_has_its_original_name(name):
    unet = weightless(PUBLISHED[name])
    weights = unet.state_dict()
    original = original_unet(weights, unet.config.layers_per_block)
    assert len(original) == len(weights) == UNET_KEYS[name]
    for key, shape in KNOWN.get(name, {}).items():
        assert tuple(original[f"model.diffusion_model.{key}"].shape) == shape
    back = convert_ldm_unet_checkpoint(dict(original), unet.config)
    assert shapes(back) == shapes(weights)


def test_every_weight_of_the_vae_has_its_original_name():
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / "sd15/vae"))
    original = original_vae(vae.state_dict())
    assert len(original) == 248
    for key, shape in {
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "decoder.up.3.block.0.conv1.weight": (512, 512, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.mid.block_2.norm1.bias": (512,),
        "decoder.norm_out.weight": (128,),
        "post_quant_conv.bias": (4,),
    }.items():
        assert tuple(original[f"first_stage_model.{key}"].shape) == shape
    back = convert_ldm_vae_checkpoint(dict(original), vae.config)
    wanted = shapes(vae.state_dict())
    assert {k: tuple(s for s in v if s > 1) for k, v in shapes(back).items()} == {
        k: tuple(s for s in v if s > 1) for k, v in wanted.items()
    }


@pytest.mark.parametrize(
    ("family", "part", "keys"),
    [("sd15", 0, 196), ("sd21", 0, 23 * 12 + 12 + 4), ("sdxl", 0, 196), ("sdxl", 1, 389)],
)
def test_every_weight_of_the_text_encoders_has_its_original_name(family, part, keys):
    entry = FAMILIES[family]
    name, prefix = entry.text_encoders[part], entry.original_encoders[part]
    config = CLIPTextConfig.from_pretrained(CONFIGS / family / name)
    kind = CLIPTextModelWithProjection if part else CLIPTextModel
    with torch.device("meta"):
        encoder = kind(config)
    weights = {n.removeprefix("text_model."): t for n, t in encoder.state_dict().items()}
    original = original_encoder(encoder.state_dict(), prefix)
    assert len(original) == keys
    width = config.hidden_size
    if prefix.endswith(".model."):
        assert tuple(original[f"{prefix}positional_embedding"].shape) == (77, width)
        inner = f"{prefix}transformer.resblocks.{config.num_hidden_layers - 1}."
        assert tuple(original[f"{inner}attn.in_proj_weight"].shape) == (3 * width, width)
        assert tuple(original[f"{inner}mlp.c_fc.bias"].shape) == (4 * width,)
        back = convert_open_clip_checkpoint(encoder, original, prefix)
    else:
        back = convert_ldm_clip_checkpoint(original, prefix)
    assert shapes({n.removeprefix("text_model."): t for n, t in back.items()}) == shapes(weights)


def test_the_layer_that_sd_2_never_reads_is_there_as_a_copy():
    """ComfyUI and AUTOMATIC1111 build 24 layers and read the 23rd."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=300, hidden_size=8, intermediate_size=32, num_attention_heads=2,
        num_hidden_layers=23,
    )  # fmt: skip
    original = original_encoder(CLIPTextModel(config).state_dict(), "cond_stage_model.model.")
    blocks = "cond_stage_model.model.transformer.resblocks."
    last = {n for n in original if n.startswith(f"{blocks}23.")}
    assert len(last) == 12
    for name in last:
        assert torch.equal(original[name], original[name.replace("blocks.23.", "blocks.22.")])


def test_a_guidance_input_has_no_name_there():
    unet = weightless({**SD15, "time_cond_proj_dim": 256})
    with pytest.raises(UserError, match=r"has no layer time_embedding\.cond_proj"):
        original_unet(unet.state_dict(), 2)


def shapes(tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
