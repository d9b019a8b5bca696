"""LoRAs merged into one, against stock diffusers that mixes them, and float64 by hand."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shared.models.lora_files import read_lora
from tests.support import warm
from tests.support.exports import make_run
from tests.support.students import two_of
from tests.support.styles import ALPHA, RANK, write_style

PIPELINES = {"tiny-sd": StableDiffusionPipeline, "tiny-xl": StableDiffusionXLPipeline}
SCALES = (0.7, -0.4)


@pytest.fixture(scope="module")
def styles(repo, tmp_path_factory):
    """Model -> two LoRAs of it: diffusers' form, and kohya's where sd-scripts' names are these."""
    found = {}
    for name in PIPELINES:
        folder, model = tmp_path_factory.mktemp(name), repo / "data" / name
        second = "kohya" if name == "tiny-sd" else "diffusers"
        found[name] = (
            write_style(model, folder / "ink.safetensors", seed=5),
            write_style(model, folder / "oil.safetensors", second, seed=6),
        )
    return found


def stock(model: Path):
    pipe = PIPELINES[model.name].from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe) -> np.ndarray:
    return pipe(
        "a red square", num_inference_steps=2, guidance_scale=2.0, output_type="np", height=64,
        width=64, generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip


def mixed(model: Path, files, scales=SCALES) -> np.ndarray:
    pipe = stock(model)
    names = [f"lora{number}" for number in range(len(files))]
    for name, file in zip(names, files, strict=True):
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    pipe.set_adapters(names, list(scales))
    return draw(pipe)


def merge(cli, files, *words, scales=SCALES):
    typed = [f"{file}:{scale}" for file, scale in zip(files, scales, strict=True)]
    answer = cli("infer", "merge", *typed, *words)
    assert answer.status == 0, answer.err
    return Path(answer.out.strip()), answer.err


@pytest.mark.parametrize(("form", "name"), two_of(("kohya", "tiny-sd"), ("diffusers", "tiny-xl")))
def test_the_merged_file_draws_what_the_mixed_adapters_draw(
    cli, repo, styles, tmp_path, name, form
):
    model = repo / "data" / name
    output, said = merge(cli, styles[name], "--model", name, "--form", form,
                         "--output", tmp_path / "both.safetensors")  # fmt: skip
    pipe = stock(model)
    bare = draw(pipe)
    pipe.load_lora_weights(output.parent, weight_name=output.name)
    ours, wanted = draw(pipe), mixed(model, styles[name])
    np.testing.assert_allclose(ours, wanted, atol=1e-5)
    assert np.abs(ours - bare).max() > 0.05
    first = said.splitlines()[0]
    assert first.startswith("merging ink.safetensors at 0.7, oil.safetensors at -0.4 for ")
    assert f"for {name}, as a LoRA of" in first
    assert f"rank {2 * RANK} in the form of {form}, about " in first
    # What was merged in one form can be merged on in the other.
    again, _ = merge(cli, [output], "--model", name, "--form",
                     {"kohya": "diffusers", "diffusers": "kohya"}[form],
                     "--output", tmp_path / "again.safetensors", scales=[1])  # fmt: skip
    config = pipe.unet.config
    before, after = read_lora(output, config), read_lora(again, config)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", PIPELINES)
def test_the_merged_model_draws_it_without_any_lora(cli, repo, styles, tmp_path, name):
    model = repo / "data" / name
    wanted = mixed(model, styles[name])
    folder, _ = merge(cli, styles[name], "--model", name, "--form", "folder",
                      "--output", tmp_path / "model")  # fmt: skip
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is PIPELINES[name]
    np.testing.assert_allclose(draw(pipe), wanted, atol=1e-5)
    file, said = merge(cli, styles[name], "--model", name, "--form", "single-file",
                       "--output", tmp_path / "one.safetensors")  # fmt: skip
    assert "as one file in the original layout in float32" in said
    unet = type(pipe.unet).from_single_file(
        str(file), config=str(model), subfolder="unet", torch_dtype=torch.float32
    )
    assert all(torch.equal(unet.state_dict()[k], t) for k, t in pipe.unet.state_dict().items())
    if name == "tiny-sd":  # in tiny-xl diffusers cannot tell the two encoders apart
        one = PIPELINES[name].from_single_file(
            str(file), config=str(model), torch_dtype=torch.float32
        )
        one.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(draw(one), wanted, atol=1e-5)


def product(lora, layer) -> np.ndarray:
    down, up = (lora[f"{layer}.lora_{part}.weight"].double().numpy() for part in "AB")
    return up.reshape(len(up), -1) @ down.reshape(len(down), -1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_error_of_a_smaller_rank_is_the_true_one(cli, repo, styles, tmp_path, dtype):
    """Against numpy's own singular values of every layer's whole matrix, in float64."""
    rank = 2
    output, said = merge(cli, styles["tiny-sd"], "--model", "tiny-sd", "--rank", rank,
                         "--dtype", dtype, "--output", tmp_path / "small.safetensors")  # fmt: skip
    config = stock(repo / "data/tiny-sd").unet.config
    parts = [read_lora(file, config) for file in styles["tiny-sd"]]
    small = read_lora(output, config)
    layers = {key.rpartition(".lora_")[0] for key in small}
    lost = whole = best = 0.0
    for layer in layers:
        wanted = sum(s * product(lora, layer) for s, lora in zip(SCALES, parts, strict=True))
        values = np.linalg.svd(wanted, compute_uv=False)
        lost += ((wanted - product(small, layer)) ** 2).sum()
        best += (values[rank:] ** 2).sum()
        whole += (values**2).sum()
        assert len(small[f"{layer}.lora_A.weight"]) == rank
    told = float(said.splitlines()[-1].removeprefix(f"rank {rank}: relative error "))
    assert told == pytest.approx((lost / whole) ** 0.5, rel=5e-3)  # three digits are printed
    assert lost == pytest.approx(best, rel=1e-4)  # no LoRA of this rank is nearer
    assert 0.05 < told < 1


def test_a_rank_that_holds_all_loses_nothing(cli, styles, tmp_path):
    _, said = merge(cli, styles["tiny-sd"], "--model", "tiny-sd", "--rank", 2 * RANK,
                    "--output", tmp_path / "same.safetensors")  # fmt: skip
    assert "relative error 0\n" in said


def test_layers_may_differ_and_alphas_count(cli, repo, styles, tmp_path):
    """One LoRA lacks half of the other's layers; kohya's alpha is not its rank."""
    ink, oil = styles["tiny-sd"]
    half = {k: t for k, t in load_file(oil).items() if "attn1" in k}
    assert 0 < len(half) < len(load_file(oil))
    some = tmp_path / "some.safetensors"
    save_file(half, some)
    assert {float(t) for k, t in half.items() if k.endswith(".alpha")} == {ALPHA} != {RANK}
    output, _ = merge(
        cli, [ink, some], "--model", "tiny-sd", "--output", tmp_path / "x.safetensors"
    )
    pipe = stock(repo / "data/tiny-sd")
    pipe.load_lora_weights(output.parent, weight_name=output.name)
    np.testing.assert_allclose(draw(pipe), mixed(repo / "data/tiny-sd", [ink, some]), atol=1e-5)


def test_a_run_stands_for_its_lora_and_names_the_model(cli, tiny_sd, tiny_cache, styles, tmp_path):
    run = make_run(tmp_path / "run", tiny_cache, tiny_sd, "sd", "lora", report_to=())
    ink = styles["tiny-sd"][0]
    output, said = merge(cli, [run.folder, ink], "--output", tmp_path / "both.safetensors",
                         scales=[1, 0.3])  # fmt: skip
    assert "for tiny-sd, as a LoRA of" in said
    pipe = stock(tiny_sd)
    pipe.load_lora_weights(output.parent, weight_name=output.name)
    files = [run.folder / "pytorch_lora_weights.safetensors", ink]
    np.testing.assert_allclose(draw(pipe), mixed(tiny_sd, files, (1, 0.3)), atol=1e-5)
    with safe_open(output, "pt") as file:
        marks = json.loads(file.metadata()["distillery.merged"])
    assert [mark.rpartition(":")[2] for mark in marks] == ["1", "0.3"]


def test_half_precision(cli, repo, styles, tmp_path):
    whole, _ = merge(cli, styles["tiny-sd"], "--model", "tiny-sd", "--output",
                     tmp_path / "whole.safetensors")  # fmt: skip
    half, _ = merge(cli, styles["tiny-sd"], "--model", "tiny-sd", "--dtype", "float16",
                    "--output", tmp_path / "half.safetensors")  # fmt: skip
    a, b = load_file(whole), load_file(half)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k].half(), t.half()) for k, t in b.items())
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    folder, _ = merge(cli, styles["tiny-xl"], "--model", "tiny-xl", "--dtype", "float16",
                      "--form", "folder", "--output", tmp_path / "folder")  # fmt: skip
    weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_mistakes_are_told_in_a_line(cli, repo, styles, tmp_path):
    ink = styles["tiny-sd"][0]
    out = ("--output", tmp_path / "x.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for words, status, cause in (
        ([], 2, "which LoRAs? For example: python -m infer merge"),
        ([ink, *out], 2, "which model are these LoRAs for? Say --model"),
        ([styles["tiny-xl"][0], "--model", "tiny-sd", *out], 1, "is of another model than tiny-sd"),
        ([f"{ink}:much", "--model", "tiny-sd", *out], 2, "'much' is no number; give a scale"),
        ([f"{ink}:1e39", "--model", "tiny-sd", *out], 1, "overflows at scale 1e+39"),
        ([f"{ink}:0", "--model", "tiny-sd", *out], 2, "a scale of 0 cannot be"),
        ([tmp_path / "no.safetensors", "--model", "tiny-sd", *out], 1, "is not there"),
        ([tmp_path / "empty", "--model", "tiny-sd", *out], 1, "empty holds no LoRA"),
        ([repo / "data/tiny-sd", "--model", "tiny-sd", *out], 1, "holds a whole UNet"),
        ([ink, "--model", "tiny-sd", "--output", tmp_path / "x.ckpt"], 1, "ends with .safetensors"),
        ([ink, "--model", "tiny-sd", "--form", "folder", "--output", tmp_path / "full"], 1,
         "full is there already"),
    ):  # fmt: skip
        answer = cli("infer", "merge", *words)
        assert (answer.status, answer.err.count("\n")) == (status, 1), answer
        assert cause in answer.err
        assert not (tmp_path / "x.safetensors").exists()
    assert (tmp_path / "full/mine.txt").read_text() == "mine"


def test_what_a_killed_merge_left_is_gone_after_the_next(styles, tmp_path):
    """Killed as the model's first file is written; only the user's own are left beside it."""
    (tmp_path / "mine.txt").write_text("mine")
    words = ["merge", *map(str, styles["tiny-sd"]), "--model", "tiny-sd", "--form", "folder"]
    killed = f"""
import os, signal, sys
from diffusers import StableDiffusionPipeline
def die(self, folder, **_):
    (folder / "half").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
StableDiffusionPipeline.save_pretrained = die
sys.argv = ["infer", *{words!r}]
from infer.__main__ import main
main()
"""
    assert warm.run(["-c", killed], tmp_path).returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.rglob("*")]
    assert "half" in left
    assert not (tmp_path / "merged").exists()
    assert warm.run(["-m", "infer", *words], tmp_path).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["merged", "mine.txt"]


@pytest.mark.parametrize("form", ["kohya", "single-file", "folder"])
def test_ctrl_c_leaves_no_half_file(cli, styles, tmp_path, monkeypatch, form):
    """Interrupted as the finished file is about to get its name."""
    output = tmp_path / ("model" if form == "folder" else "x.safetensors")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    typed = [str(file) for file in styles["tiny-sd"]]
    answer = cli("infer", "merge", *typed, "--model", "tiny-sd", "--form", form, "--output", output)
    assert answer.status == 130
    assert not output.exists()
    assert list(tmp_path.iterdir()) == []
