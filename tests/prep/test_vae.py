"""`--vae`: another VAE than the model's own, and those that do not fit."""

import numpy as np
import pytest
from diffusers import AutoencoderKL

from shared.models.rescale import rescale_vae, save_rescaled
from shared.models.vae import load_vae
from tests.support.loud_vae import latents_of, loud_vae, model_with
from tests.support.sources import (
    TINY_SD,
    captioned,
    encode,
    manifest,
    prep,
    refusal,
    tree,
    write_tar,
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_tar(tmp_path_factory.mktemp("pictures") / "a.tar", captioned(range(10)))


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    return str(model_with(loud_vae(), tmp_path_factory.mktemp("loud") / "model"))


@pytest.fixture(scope="module")
def right(pictures, loud, tmp_path_factory):
    """The loud model's cache in fp32."""
    return encode(pictures, tmp_path_factory.mktemp("right") / "cache", model=loud)


def test_another_vae(pictures, loud, right, tmp_path):
    """A VAE's own folder, a model's, a rescaled one: the same latents, decoded without flags."""
    vae = load_vae(loud)
    vae.save_pretrained(tmp_path / "vae")
    save_rescaled(rescale_vae(vae, 2.0**-7, 2.0**-7), tmp_path / "rescaled")
    cache = encode(pictures, tmp_path / "cache", vae=str(tmp_path / "vae"))
    assert manifest(cache)["identity"]["vae"]["source"] == str(tmp_path / "vae")
    assert np.array_equal(latents_of(cache), latents_of(right))
    before = tree(cache)
    for same in (None, str(tmp_path / "rescaled"), loud):
        encode(pictures, cache, vae=same)
    assert tree(cache) == before
    assert prep("decode", "--cache", cache, "--output", tmp_path / "sheet.png").status == 0
    words = ("--shards", pictures, "--model", "tiny-sd", "--cache", cache, "--latents", "mean")
    assert "vae.fingerprint" in refusal("encode", *words, "--vae", TINY_SD)
    line = refusal("decode", "--cache", cache, "--vae", TINY_SD)
    assert "another VAE" in line
    assert "--vae" in line


def test_train_says_which_vae_to_pass(cli, pictures, loud, tmp_path):
    cache = encode(pictures, tmp_path / "cache", vae=loud)
    words = ("train", "distill", "--model", "tiny-sd", "--cache", cache, "--run", tmp_path / "run")
    small = ("--train-batch-size", 2, "--max-train-steps", 1, "--lora-rank", 2, "--threads", 1)
    answer = cli(*words, *small)
    assert answer.status == 1
    assert f"pass --vae {loud} it was made with" in answer.err
    assert cli(*words, *small, "--vae", loud, "--validation-steps", 1).status == 0
    drawn = cli("train", "sample", "--run", tmp_path / "run", "--prompt", "picture number 0",
                "--output", tmp_path / "x.png", "--steps", 1, "--threads", 1)  # fmt: skip
    assert drawn.status == 0, drawn.err
    assert (tmp_path / "x.png").exists()


def test_vaes_that_do_not_fit(pictures, tmp_path):
    words = ("--shards", pictures, "--model", "tiny-sd", "--cache", tmp_path / "cache")
    line = refusal("encode", *words, "--vae", tmp_path / "nowhere")
    assert "no VAE can be read from" in line
    wide = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=16,
    )
    wide.save_pretrained(tmp_path / "wide")
    line = refusal("encode", *words, "--vae", tmp_path / "wide")
    assert "16 channels" in line
    assert "takes 4" in line
    assert not (tmp_path / "cache").exists()
