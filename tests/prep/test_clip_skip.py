"""`--clip-skip` against the stock pipelines' `encode_prompt(clip_skip=...)`."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.numpy import load_file

from tests.support.sources import (
    TINY_SD,
    TINY_XL,
    captioned,
    encode,
    png,
    prep,
    refusal,
    samples,
    write_tar,
)

FILES = [("a.png", png(1)), ("a.txt", b"a red circle on a blue field")]
CAPTION = "a red circle on a blue field"


def close(found, exact):
    assert found.dtype == np.float16
    np.testing.assert_allclose(found.astype(float), exact.numpy(), rtol=2.0**-10, atol=2e-5)


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    return write_tar(tmp_path_factory.mktemp("clip") / "a.tar", FILES)


def stock(kind, folder, clip_skip):
    pipe = kind.from_pretrained(folder, torch_dtype=torch.float32)
    if kind is StableDiffusionPipeline and not hasattr(pipe.text_encoder, "text_model"):
        # Where diffusers looks for the final norm; transformers 5 has it one level higher.
        vars(pipe.text_encoder)["text_model"] = pipe.text_encoder
    words = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.inference_mode():
        return pipe.encode_prompt(prompt=CAPTION, clip_skip=clip_skip, **words)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_sd_is_the_stock_pipelines(tar, tmp_path, clip_skip):
    words = {"clip_skip": clip_skip, "preview_prompts": (CAPTION,)}
    cache = encode(tar, tmp_path / "cache", **words)
    embeds, negative = stock(StableDiffusionPipeline, TINY_SD, clip_skip)
    close(samples(cache)["a"].arrays["prompt_embeds"], embeds)
    stored = load_file(cache / "conditioning.safetensors")
    close(stored["prompts.prompt_embeds"], embeds)
    close(stored["empty.prompt_embeds"], negative)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_sdxl_is_the_stock_pipelines(tar, tmp_path, clip_skip):
    cache = encode(tar, tmp_path / "cache", model="tiny-xl", clip_skip=clip_skip)
    embeds, negative, pooled, negative_pooled = stock(StableDiffusionXLPipeline, TINY_XL, clip_skip)
    found = samples(cache)["a"].arrays
    close(found["prompt_embeds"], embeds)
    close(found["pooled_prompt_embeds"], pooled)
    stored = load_file(cache / "conditioning.safetensors")
    close(stored["empty.prompt_embeds"], negative)
    close(stored["empty.pooled_prompt_embeds"], negative_pooled)


@pytest.mark.parametrize(("model", "most"), [("tiny-sd", 1), ("tiny-xl", 1)])  # 2 and 3 layers
def test_more_than_there_are_is_refused(tar, tmp_path, model, most):
    flags = ["--shards", tar, "--model", model, "--cache", tmp_path / "c", "--clip-skip", most + 1]
    assert f"--clip-skip {most + 1} is above {most}" in refusal("encode", *flags)


def test_zero_is_the_default_and_one_is_another(tar, tmp_path):
    default = samples(encode(tar, tmp_path / "default"))["a"].arrays["prompt_embeds"]
    zero = samples(encode(tar, tmp_path / "zero", clip_skip=0))["a"].arrays["prompt_embeds"]
    one = samples(encode(tar, tmp_path / "one", clip_skip=1))["a"].arrays["prompt_embeds"]
    assert (default == zero).all()
    assert np.abs(default.astype(float) - one).max() > 0.01


def test_it_belongs_to_the_identity_and_embed_keeps_to_it(tar, tmp_path):
    cache = encode(tar, tmp_path / "cache", clip_skip=1)
    words = ["--shards", tar, "--model", "tiny-sd", "--cache", cache, "--threads", 1]
    assert "clip_skip is 1 there, 0 here" in refusal("encode", *words)
    assert "--clip-skip -1 must be at least 0" in refusal("encode", *words, "--clip-skip", -1)
    assert prep("embed", "--cache", cache, "--prompts", "a star").status == 0
    fresh = encode(tar, tmp_path / "fresh", clip_skip=1, preview_prompts=("a star",))
    added = load_file(cache / "conditioning.safetensors")["prompts.prompt_embeds"]
    assert (
        added[-1] == load_file(fresh / "conditioning.safetensors")["prompts.prompt_embeds"]
    ).all()


def test_every_caption_of_a_picture_is_skipped_alike(tmp_path):
    files = [("a.png", png(1)), ("a.json", b'{"caption": ["a star", "a ring"]}')]
    files += captioned(range(2))
    words = {"clip_skip": 1, "max_captions": 2}
    many = encode(write_tar(tmp_path / "a.tar", files), tmp_path / "cache", **words)
    one = [("b.png", png(1)), ("b.txt", b"a ring")]
    alone = encode(write_tar(tmp_path / "b.tar", one), tmp_path / "alone", clip_skip=1)
    ring = samples(many)["a"].arrays["prompt_embeds"][1]
    assert (ring == samples(alone)["b"].arrays["prompt_embeds"][0]).all()
