"""Exported weights, read without this project and without their metadata."""

import os
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from shared.errors import UserError
from shared.networks.denoiser import load_unet
from tests.support import warm
from train.export.student import export_student, variant
from train.export.weights import exported_student
from train.networks.full import guided_copy

RANK, ALPHA = 4, 6.5
LORA, KOHYA = "pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"
UNET = "unet/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def student(tiny_sd) -> UNet2DConditionModel:
    """With an adapter on a layer of each kind, whose alpha is not its rank, as if trained."""
    unet = load_unet(str(tiny_sd))
    ends = ("to_q", "proj_in", "conv1", "conv_shortcut", "downsamplers.0.conv", "time_emb_proj")
    names = [name for name, _ in unet.named_modules() if name.endswith(ends)]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.5, target_modules=names)
    unet.add_adapter(config)
    torch.manual_seed(1)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return unet


@pytest.fixture(scope="module")
def full(tiny_sd) -> UNet2DConditionModel:
    return guided_copy(load_unet(str(tiny_sd)), 32, "random")


def trained(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """What peft adds to each layer."""
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, BaseTunerLayer)}
    assert {layer.scaling["default"] for layer in layers.values()} == {ALPHA / RANK}
    return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


def product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """A LoRA's delta as every reader computes it: 3 x 3 down, 1 x 1 up for a convolution."""
    delta = up.float().flatten(1) @ down.float().flatten(1)
    return delta.reshape(len(up), *down.shape[1:])


def test_the_bare_state_dict_is_what_was_trained(student, tmp_path):
    export_student(student, tmp_path)
    stored = load_file(tmp_path / LORA)
    deltas = trained(student)
    assert len(stored) == 2 * len(deltas)
    for name, delta in deltas.items():
        up, down = (stored[f"unet.{name}.lora_{side}.weight"] for side in "BA")
        torch.testing.assert_close(product(up, down), delta, rtol=1e-5, atol=1e-6)


def test_comfyui_and_a1111_read_what_was_trained(student, tmp_path):
    """alpha / rank times the product; 1 where a file has no alpha."""
    export_student(student, tmp_path)
    stored = load_file(tmp_path / KOHYA)
    for name, delta in trained(student).items():
        module = f"lora_unet_{name.replace('.', '_')}"
        up, down = (stored[f"{module}.lora_{side}.weight"] for side in ("up", "down"))
        assert stored[f"{module}.alpha"] / len(down) == 1
        torch.testing.assert_close(product(up, down), delta, rtol=1e-5, atol=1e-6)
    with safe_open(tmp_path / KOHYA, "pt") as file:
        told = file.metadata()
    assert told["ss_network_alpha"] == told["ss_network_dim"] == str(RANK)


def draw(unet: UNet2DConditionModel) -> torch.Tensor:
    torch.manual_seed(2)
    z, text = torch.randn(1, 4, 8, 8), torch.randn(1, 16, unet.config.cross_attention_dim)
    with torch.inference_mode():
        return unet(z, torch.tensor([499]), text).sample


@pytest.mark.parametrize("how", ["file", "bare", "older file"])
def test_stock_diffusers_draws_the_same_however_it_is_given(student, tiny_sd, tmp_path, how):
    student.eval()
    wanted = draw(student)
    student.train()
    export_student(student, tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, torch_dtype=torch.float32)
    if how == "older file":  # alpha in the metadata alone
        adapter = student.peft_config["default"].to_dict()
        adapter.update(target_modules=sorted(adapter["target_modules"]), lora_dropout=0.0)
        StableDiffusionPipeline.save_lora_weights(
            tmp_path, get_peft_model_state_dict(student), unet_lora_adapter_metadata=adapter
        )
    pipe.load_lora_weights(load_file(tmp_path / LORA) if how == "bare" else tmp_path)
    # Dropout of training would go on in a pipeline, whose adapters are in training mode.
    torch.testing.assert_close(draw(pipe.unet), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "both", "fp16"])
def test_both_files_of_a_lora_have_the_dtype_asked_for(student, tmp_path, dtype):
    export_student(student, tmp_path, dtype)
    wanted = torch.float16 if dtype == "fp16" else torch.float32
    for file in (LORA, KOHYA):
        weights = {k: v for k, v in load_file(tmp_path / file).items() if k.endswith("weight")}
        assert {tensor.dtype for tensor in weights.values()} == {wanted}
    assert exported_student(tmp_path, "lora") is not None


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "both"])
def test_diffusers_loads_the_variants(full, tmp_path, dtype):
    """As its guide writes: variant="fp16"."""
    export_student(full, tmp_path, dtype)
    exact = {None: ["fp32", "both"], "fp16": ["fp16", "both"]}
    for name, dtypes in exact.items():
        if dtype in dtypes:
            kind = torch.float16 if name else torch.float32
            loaded = UNet2DConditionModel.from_pretrained(
                tmp_path, subfolder="unet", variant=name, torch_dtype=kind
            )
            for key, tensor in full.state_dict().items():
                assert torch.equal(loaded.state_dict()[key], tensor.to(kind))
    names = {path.name.partition(".")[2] for path in (tmp_path / "unet").glob("*.safetensors")}
    ends = {"fp32": {"safetensors"}, "fp16": {"fp16.safetensors"}}
    assert names == ends.get(dtype, ends["fp32"] | ends["fp16"])
    assert variant(tmp_path / "unet") == ("fp16" if dtype == "fp16" else None)
    assert "_name_or_path" not in (tmp_path / "unet/config.json").read_text()


def test_what_does_not_fit_into_fp16_is_refused(student, tmp_path):
    export_student(student, tmp_path, "fp32")
    before = (tmp_path / LORA).read_bytes()
    weight = next(p for p in student.parameters() if p.requires_grad)
    kept = weight.data.clone()
    weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match=r"does not fit into fp16; use --export-dtype fp32"):
        export_student(student, tmp_path, "fp16")
    weight.data.copy_(kept)
    assert (tmp_path / LORA).read_bytes() == before
    assert list((tmp_path / "tmp").iterdir()) == []


SCRIPT = """
import sys
from pathlib import Path
import torch
from peft import LoraConfig
from train.export.student import export_student
from train.networks.full import guided_copy
from shared.networks.denoiser import load_unet
unet = load_unet(sys.argv[1])
full = guided_copy(unet, 32, "zero")
torch.manual_seed(0)
unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v", "to_k"]))
export_student(unet, Path(sys.argv[2]))
export_student(full, Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_two_processes_export_the_same_bytes(tiny_sd, tmp_path, repo):
    """Sets, hash seeds and Rust's maps have another order in each."""
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONPATH": str(repo), "PYTHONHASHSEED": other}
    command = [sys.executable, "-c", SCRIPT, tiny_sd, tmp_path / "1"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert warm.run(["-c", SCRIPT, tiny_sd, tmp_path / "2"], repo).returncode == 0
    files = []
    for number in "12":
        paths = [path for path in (tmp_path / number).rglob("*") if path.is_file()]
        files.append({str(p.relative_to(tmp_path / number)): p.read_bytes() for p in paths})
    assert files[0] == files[1]
    assert {LORA, KOHYA, f"{UNET}.safetensors", "unet/config.json"} <= files[0].keys()
