"""A user's mistake about models and flags is one line with its cause and its remedy."""

import os
import shutil
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.support.sources import (
    TINY_SD,
    captioned,
    refusal,
    write_folder,
    write_tar,
)


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "good.tar", captioned(range(6)))


@pytest.fixture
def run(tmp_path):
    """The line with which `prep encode` refuses; it must not leave a cache that looks begun."""

    def refused(shards, *flags, model="tiny-sd", cache=None):
        shards = [shards] if isinstance(shards, str | os.PathLike) else shards
        cache = cache or tmp_path / "cache"
        words = ["--model", model, "--cache", cache, "--threads", 1, *flags]
        return refusal("encode", "--shards", *shards, *words)

    return refused


@pytest.fixture
def offline():
    import huggingface_hub.constants

    with mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True):
        yield


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("tiny-sdd", "tiny-sd, tiny-xl"),
        ("./tiny-sd", "neither a folder here"),
        ("nobody/no-such-model", "hf download nobody/no-such-model --local-dir FOLDER"),
        ("a/b/c", "owner/name"),
    ],
)
def test_mistyped_models(run, tar, tmp_path, offline, model, named):
    line = run(tar, model=model)
    assert repr(model) in line
    assert named in line
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_is_no_model(run, tar, tmp_path):
    line = run(tar, model=tmp_path)
    assert f"{tmp_path} has no unet/config.json" in line


def test_a_model_of_no_known_family(run, tar, tmp_path):
    model = shutil.copytree(TINY_SD, tmp_path / "model")
    config = (model / "unet" / "config.json").read_text()
    (model / "unet" / "config.json").write_text(
        config.replace('"cross_attention_dim": 64', '"cross_attention_dim": 65')
    )
    line = run(tar, model=model)
    assert "65" in line
    assert "sdxl 2048" in line


@pytest.mark.parametrize(
    "part",
    [
        "vae/diffusion_pytorch_model.safetensors", "vae/config.json",
        "text_encoder/model.safetensors", "text_encoder/config.json",
        "tokenizer/tokenizer.json", "unet/config.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["missing", "cut short", "git-lfs pointer"])
def test_a_damaged_model(run, tar, tmp_path, part, how):
    model = shutil.copytree(TINY_SD, tmp_path / "model")
    path = model / part
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n")
    line = run(tar, model=model)
    assert str(model) in line
    assert not (tmp_path / "cache").exists()


def test_pickled_weights_are_not_read(run, tar, tmp_path):
    for part, name in (
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "pytorch_model"),
    ):
        model = shutil.copytree(TINY_SD, tmp_path / f"model of {part}")
        (weights,) = (model / part).glob("*.safetensors")
        torch.save(load_file(weights), model / part / f"{name}.bin")
        weights.unlink()
        assert str(model) in run(tar, model=model)


# --- flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--resolution", 20), ("--resolution", -64), ("--max-captions", 0), ("--latents", "median"),
        ("--decode-workers", 0), ("--vae-batch-size", -1), ("--text-batch-size", -1),
        ("--threads", -1), ("--device", "gpu"), ("--folder-units", -2), ("--folder-units", 0),
        ("--max-reject-fraction", 1.5), ("--max-reject-fraction", "nan"), ("--max-pwatermark", 80),
    ],
)  # fmt: skip
def test_impossible_flags(run, tar, tmp_path, flag, value):
    assert flag in run(tar, flag, value)
    assert not (tmp_path / "cache").exists()


def test_folder_units_that_are_no_power_of_two(run, tmp_path):
    folder = write_folder(tmp_path / "folder", range(2))
    assert "--folder-units 3 is not a power of two" in run(folder, "--folder-units", 3)


def test_an_unknown_command_and_a_missing_setting(tmp_path):
    assert "encode, synthesize, teach, finish, embed, verify, decode" in refusal("enc")
    (tmp_path / "run.toml").write_text("shard = ['a.tar']\n")
    line = refusal("encode", "--config", tmp_path / "run.toml", "--model", "m", "--cache", "c")
    assert "no such setting: shard" in line
