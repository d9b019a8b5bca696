"""Checkpoints, LoRAs and weights are taken whole or not at all, and the error names the tensor."""

import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prep.encoders.clip import load_clip
from shared.errors import UserError
from shared.models.family import FAMILIES, Model
from shared.models.vae import load_vae
from shared.networks.denoiser import load_unet
from train.config import DistillConfig
from train.export.student import load_student
from train.trainer.loop import distill
from train.trainer.setup import prepare

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny_cache, tiny_sd, tmp_path_factory):
    """Of a finished run, that is to go on."""
    flags = {
        "model": str(tiny_sd), "cache": tiny_cache, "run": tmp_path_factory.mktemp("run") / "run",
        "threads": 1, "train_batch_size": 2, "max_train_steps": 1, "checkpointing_steps": 1,
        "lora_rank": 2, "validation_steps": 0, "device": "cpu", "report_to": ("none",),
    }  # fmt: skip
    distill(prepare(DistillConfig(**flags)))
    return DistillConfig(**flags, resume_from_checkpoint="latest")


def spoil(tensors: dict, how: str) -> str:
    """Break one tensor of a file; returns a pattern of what must be said of it."""
    name = sorted(name for name in tensors if not name.endswith("/step"))[0]
    tensor, said = tensors[name], re.escape(name)
    match how:
        case "one number":
            tensors[name] = tensor.flatten()[:1].clone()
            return rf"{said} has shape \[1\], not \["
        case "missing":
            del tensors[name]
            return rf"lacks .*{said}"
        case "extra":
            tensors["another"] = torch.ones(1)
            return "another"
        case "whole numbers":
            tensors[name] = tensor.int()
            return rf"{said} holds int32"
        case "not finite":
            tensors[name] = tensor.clone()
            tensors[name].view(-1)[-1] = torch.nan
            return rf"{said} holds numbers that are not finite"
        case "nothing":
            tensors.clear()
            return "lacks"


@pytest.mark.parametrize("file", ["networks.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize(
    "how", ["one number", "missing", "extra", "whole numbers", "not finite", "nothing"]
)
def test_a_checkpoint_is_taken_whole_or_not_at_all(config, file, how):
    path = config.run / "checkpoints" / "step-00000001" / file
    state = path.with_name("state.json")
    before, sizes = path.read_bytes(), state.read_text()
    tensors = load_file(path)
    said = spoil(tensors, how)
    save_file(tensors, path)
    state.write_text(re.sub(r'"files": \{[^}]*\}', '"files": {}', sizes))
    try:
        with pytest.raises(UserError, match=rf"{file}.*{said}") as error:
            prepare(config)
        assert "\n" not in str(error.value)
    finally:
        path.write_bytes(before)
        state.write_text(sizes)


def test_a_checkpoint_that_is_whole_is_taken(config):
    assert prepare(config).step == 1


@pytest.mark.parametrize("how", ["one number", "missing", "extra", "not finite", "other names"])
def test_a_lora_that_does_not_fit_is_not_drawn_without(config, tmp_path, how):
    for name in ("config.json", "pytorch_lora_weights.safetensors"):
        shutil.copy(config.run / name, tmp_path / name)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if how == "other names":
        tensors = {f"x.{name}": tensor for name, tensor in tensors.items()}
    else:
        spoil(tensors, how)
    said = {"one number": "shape", "missing": "lacks", "not finite": "finite"}.get(how, "layers")
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=rf"pytorch_lora_weights\.safetensors.*{said}"):
        load_student(tmp_path, CPU)


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("how", ["missing", "one number", "not finite", "nothing"])
def test_a_models_weights_are_all_there(tiny_sd, tmp_path, part, how, capsys):
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    [path] = (model / part).glob("*.safetensors")
    tensors = load_file(path)
    spoil(tensors, how)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=re.escape(str(model))) as error:
        {"unet": load_unet, "vae": load_vae}[part](str(model))
    assert "\n" not in str(error.value)
    assert capsys.readouterr().err == ""  # the libraries' own tables are not shown


def test_text_encoders_weights_are_all_there(tiny_sd, tmp_path):
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    [path] = (model / "text_encoder").glob("*.safetensors")
    whole = load_file(path)
    for how in ("missing", "one number", "not finite"):
        tensors = dict(whole)
        spoil(tensors, how)
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(UserError, match="its text_encoder") as error:
            load_clip(Model(str(model), FAMILIES["tiny-sd"]), "text_encoder")
        assert "\n" not in str(error.value)
