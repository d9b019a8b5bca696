"""The LoRA file for ComfyUI and kohya's tools, read back by diffusers' own converter."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from shared.networks.denoiser import load_unet
from tests.support.models import SD15, SD21, SDXL, weightless
from tests.support.students import two_of
from train.export.kohya import kohya_metadata, kohya_tensors
from train.export.student import export_student
from train.networks.full import guided_copy

RANK, ALPHA = 4, 6.0
PIPELINES = {"tiny-sd": StableDiffusionPipeline, "tiny-xl": StableDiffusionXLPipeline}


def every_layer(unet: UNet2DConditionModel) -> list[str]:
    """All that `--lora-target-modules` can name."""
    return [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def with_adapter(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """An adapter on every layer, as if it had been trained."""
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=every_layer(unet)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return unet


def answer(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    width = unet.config.cross_attention_dim
    added = None
    if unet.config.addition_embed_type:
        added = {
            "text_embeds": noise(2, 64),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
        }
    with torch.inference_mode():
        return unet(
            noise(2, 4, 8, 8),
            torch.tensor([999, 259]),
            noise(2, 16, width),
            added_cond_kwargs=added,
        ).sample


@pytest.mark.parametrize(
    ("name", "model"),
    two_of(("pytorch_lora_weights", "tiny-sd"), ("kohya_lora_weights", "tiny-xl")),
)
def test_stock_diffusers_computes_what_training_computed(model, name, repo, tmp_path):
    folder = repo / "data" / model
    teacher = load_unet(str(folder))
    bare = answer(teacher)
    student = with_adapter(teacher)
    wanted = answer(student)
    assert (wanted - bare).abs().max() > 0.1
    export_student(student, tmp_path)
    pipe = PIPELINES[model].from_pretrained(folder, torch_dtype=torch.float32)
    pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors")
    torch.testing.assert_close(answer(pipe.unet), wanted, rtol=1e-5, atol=1e-5)
    pipe.unload_lora_weights()
    torch.testing.assert_close(answer(pipe.unet), bare, rtol=1e-5, atol=1e-5)


# As files found in the wild call them.
KNOWN = {
    "sd15": [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_mid_block_attentions_0_proj_in",
        "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_down_blocks_0_downsamplers_0_conv",
        "lora_unet_up_blocks_0_resnets_0_conv_shortcut",
        "lora_unet_conv_in",
        "lora_unet_conv_out",
        "lora_unet_time_embedding_linear_1",
    ],
    "sdxl": [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_2",
        "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0",
        "lora_unet_output_blocks_5_1_proj_in",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_5_2_conv",
        "lora_unet_middle_block_2_out_layers_3",
        "lora_unet_input_blocks_1_0_emb_layers_1",
        "lora_unet_output_blocks_8_0_skip_connection",
        "lora_unet_input_blocks_0_0",
        "lora_unet_out_2",
        "lora_unet_time_embed_0",
        "lora_unet_time_embed_2",
        "lora_unet_label_emb_0_0",
        "lora_unet_label_emb_0_2",
    ],
}
KNOWN["sd21"] = KNOWN["sd15"]


@pytest.mark.parametrize(
    ("name", "config"),
    [("sd15", SD15), ("sd21", SD21), pytest.param("sdxl", SDXL, marks=pytest.mark.slow)],
)
def test_every_module_of_the_published_models_is_found_again(name, config):
    """Nothing is left over and nothing is missing when diffusers reads the names."""
    unet = weightless(config)
    targets = every_layer(unet)
    modules = dict(unet.named_modules())
    adapter = {}
    for target in targets:
        weight = modules[target].weight
        spatial = weight.shape[2:]
        adapter[f"{target}.lora_A.weight"] = torch.zeros(1, weight.shape[1], *spatial)
        adapter[f"{target}.lora_B.weight"] = torch.zeros(weight.shape[0], 1, *[1 for _ in spatial])
    tensors = kohya_tensors(adapter, unet)
    assert len(tensors) == 3 * len(targets)
    stems = {key.partition(".")[0] for key in tensors}
    assert stems.issuperset(KNOWN[name])
    pipeline = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    found, alphas = pipeline.lora_state_dict(tensors, unet_config=unet.config)
    assert len(found) == 2 * len(targets)
    assert len(alphas) == len(targets)
    unet.load_lora_adapter(found, prefix="unet", network_alphas=alphas, low_cpu_mem_usage=True)
    loaded = {n: m for n, m in unet.named_modules() if hasattr(m, "lora_A")}
    assert sorted(loaded) == sorted(targets)
    assert {m.scaling[key] for m in loaded.values() for key in m.scaling} == {1.0}  # alpha / rank
    for target, layer in loaded.items():
        (down,) = layer.lora_A.values()
        assert down.weight.shape == adapter[f"{target}.lora_A.weight"].shape


def test_a_layer_without_a_name_there_costs_that_file_alone(tiny_xl, tmp_path, capsys):
    """The original SDXL has no guidance embedding; diffusers' file holds it all the same."""
    export_student(with_adapter(load_unet(str(tiny_xl))), tmp_path)
    assert (tmp_path / "kohya_lora_weights.safetensors").is_file()
    guided = guided_copy(load_unet(str(tiny_xl)), 32, "zero")
    export_student(with_adapter(guided), tmp_path)
    assert capsys.readouterr().err == (
        "note: kohya_lora_weights.safetensors is left out: "
        "the original SDXL has no layer time_embedding.cond_proj\n"
    )
    assert not (tmp_path / "kohya_lora_weights.safetensors").exists()  # nor the former one
    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert "unet.time_embedding.cond_proj.lora_A.weight" in stored


@pytest.mark.parametrize(
    ("config", "base", "v2"),
    [(SD15, "sd_v1", "False"), (SD21, "sd_v2", "True"), (SDXL, "sdxl_base_v1-0", "False")],
)
def test_the_file_says_what_it_is(config, base, v2):
    """By what sd-scripts and the web UIs ask for."""
    unet = weightless(config)
    told = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(RANK),
        "ss_base_model_version": base,
        "ss_v2": v2,
    }
    assert kohya_metadata(unet, {"x.lora_down.weight": torch.zeros(4, 320)}) == told
    convolved = kohya_metadata(unet, {"x.lora_down.weight": torch.zeros(4, 320, 3, 3)})
    assert json.loads(convolved.pop("ss_network_args")) == {"conv_dim": "4", "conv_alpha": "4"}
    assert convolved == told


def test_what_the_file_holds(tiny_xl, tmp_path):
    export_student(with_adapter(load_unet(str(tiny_xl))), tmp_path)
    with safe_open(tmp_path / "kohya_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == str(RANK)
        keys = list(file.keys())
        alphas = {float(file.get_tensor(key)) for key in keys if key.endswith(".alpha")}
    assert alphas == {RANK}
    assert {key.partition(".")[2] for key in keys} == {
        "lora_down.weight", "lora_up.weight", "alpha",
    }  # fmt: skip
