"""What is encoded is right: against plain diffusers and plain transformers."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.numpy import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from prep.encoders.text import TextEncoder
from tests.support.framing import exif, squared, stored
from tests.support.sources import (
    TINY_SD,
    TINY_XL,
    accounts,
    encode,
    file_of,
    manifest,
    photo,
    samples,
    write_tar,
)

HALF = 2.0**-11  # the relative rounding error of fp16
# key -> (what a viewer shows, the file, its caption)
WIDE, TALL = photo(1, 150, 90), photo(2, 70, 100)
TURNED, TINY = photo(3, 48, 80), photo(4, 21, 30)
PICTURES = {
    "wide": (WIDE, file_of(WIDE), "a red circle on a blue field"),
    "tall": (TALL, file_of(TALL, "WEBP", lossless=True), "a green star"),
    "turned": (
        TURNED,
        file_of(stored(TURNED, 6), exif=exif(6)),
        "a large white cross at the top of a black field, and a great many words more than fit in",
    ),
    "tiny": (TINY, file_of(TINY, "BMP"), "Zürich, ½"),
}
TIME_IDS = {
    "wide": [90, 150, 0, 21, 64, 64],  # resized to 107 x 64
    "tall": [100, 70, 13, 0, 64, 64],  # resized to 64 x 91
    "turned": [80, 48, 21, 0, 64, 64],  # shown upright; resized to 64 x 107
    "tiny": [30, 21, 13, 0, 64, 64],  # enlarged to 64 x 91
}


def posterior(model, pixels):
    """Mean and logvar of one picture at a time."""
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    with torch.inference_mode():
        found = [vae.encode(image[None]).latent_dist for image in images]
    return np.stack([f.mean[0].numpy() for f in found]), np.stack(
        [f.logvar[0].numpy() for f in found]
    )


def assert_is_fp16_of(found, exact):
    """No further from `exact` than rounding goes, and float32's own noise."""
    assert found.dtype == np.float16
    assert found.shape == exact.shape
    np.testing.assert_allclose(found.astype(np.float64), exact, rtol=1.02 * HALF, atol=2e-5)


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    files = [
        file
        for key, (_, content, caption) in PICTURES.items()
        for file in ((f"{key}.png", content), (f"{key}.txt", caption.encode()))
    ]
    return write_tar(tmp_path_factory.mktemp("source") / "pictures.tar", files)


@pytest.fixture(scope="module")
def sd(tar):
    return encode(tar, tar.parent / "sd", latents="posterior", preview_prompts=("a star", "b"))


@pytest.fixture(scope="module")
def xl(tar):
    return encode(tar, tar.parent / "xl", model="tiny-xl")


def test_posterior_latents_are_the_vaes_mean_and_logvar(sd):
    found = samples(sd)
    mean, logvar = posterior(TINY_SD, [squared(image) for image, _, _ in PICTURES.values()])
    for key, m, v in zip(PICTURES, mean, logvar, strict=True):
        latents = found[key].arrays["latents"]
        assert_is_fp16_of(latents, np.concatenate([m, v.clip(-30, 20)])[None])


def test_mean_latents_are_the_vaes_mean_unscaled(xl):
    mean, _ = posterior(TINY_XL, [squared(image) for image, _, _ in PICTURES.values()])
    found = samples(xl)
    for key, m in zip(PICTURES, mean, strict=True):
        assert_is_fp16_of(found[key].arrays["latents"], m[None])


def test_corner_crop_and_another_resolution(tar, tmp_path):
    cache = encode(tar, tmp_path / "cache", model="tiny-xl", center_crop=False, resolution=48)
    found = samples(cache)
    mean, _ = posterior(TINY_XL, [squared(p[0], 48, corner=True) for p in PICTURES.values()])
    for key, m in zip(PICTURES, mean, strict=True):
        assert_is_fp16_of(found[key].arrays["latents"], m[None])
        assert found[key].arrays["time_ids"].tolist() == [[*TIME_IDS[key][:2], 0, 0, 48, 48]]


def test_sd_prompt_embeds_are_the_last_hidden_state(sd):
    tokenizer = CLIPTokenizer.from_pretrained(TINY_SD / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(TINY_SD / "text_encoder", dtype=torch.float32).eval()

    def states(texts):
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.inference_mode():
            return encoder(ids).last_hidden_state.numpy()

    found = samples(sd)
    for key, (_, _, caption) in PICTURES.items():
        assert_is_fp16_of(found[key].arrays["prompt_embeds"], states([caption]))
    stored = load_file(sd / "conditioning.safetensors")
    assert_is_fp16_of(stored["empty.prompt_embeds"], states([""]))
    assert_is_fp16_of(stored["prompts.prompt_embeds"], states(["a star", "b"]))
    assert set(stored) == {"empty.prompt_embeds", "prompts.prompt_embeds"}


def test_xl_embeds_are_the_pipelines(xl):
    pipe = StableDiffusionXLPipeline.from_pretrained(TINY_XL, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    found = samples(xl)
    for key, (_, _, caption) in PICTURES.items():
        with torch.inference_mode():
            embeds, negative, pooled, negative_pooled = pipe.encode_prompt(caption, device="cpu")
        assert_is_fp16_of(found[key].arrays["prompt_embeds"], embeds.numpy())
        assert_is_fp16_of(found[key].arrays["pooled_prompt_embeds"], pooled.numpy())
    stored = load_file(xl / "conditioning.safetensors")
    assert_is_fp16_of(stored["empty.prompt_embeds"], negative.numpy())
    assert_is_fp16_of(stored["empty.pooled_prompt_embeds"], negative_pooled.numpy())
    assert not stored["empty.prompt_embeds"].any()  # force_zeros_for_empty_prompt
    assert not stored["empty.pooled_prompt_embeds"].any()
    assert stored["prompts.prompt_embeds"].any()


def test_time_ids_are_original_size_crop_and_target_as_height_width(xl, sd):
    for key, sample in samples(xl).items():
        assert sample.arrays["time_ids"].dtype == np.int32
        assert sample.arrays["time_ids"].tolist() == [TIME_IDS[key]]
    for cache in (xl, sd):  # the account has them for every family
        assert {row["source_key"]: row["time_ids"] for row in accounts(cache)} == TIME_IDS


def test_truncated_captions_are_counted(sd):
    assert manifest(sd)["totals"]["truncated_captions"] == 1
    assert samples(sd)["turned"].record["captions"] == [PICTURES["turned"][2]]


def test_captions_beyond_the_first_and_how_many_are_real(tmp_path):
    files = [
        ("one.png", file_of(WIDE)), ("one.json", b'{"caption": ["a star", "  ", "a ring"]}'),
        ("two.png", file_of(WIDE)), ("two.json", b'{"caption": ["a", "b", "c", "d"]}'),
        ("three.png", file_of(WIDE)), ("three.txt", b"a star"),
    ]  # fmt: skip
    cache = encode(write_tar(tmp_path / "a.tar", files), tmp_path / "cache", max_captions=3)
    found = samples(cache)
    assert [found[key].record["num_captions"] for key in ("one", "two", "three")] == [2, 3, 1]
    assert found["two"].record["captions"] == ["a", "b", "c"]
    one, three = (found[key].arrays["prompt_embeds"] for key in ("one", "three"))
    assert one.shape == (3, 16, 64)
    star, ring = one[0], one[1]
    assert (one[2] == star).all()  # repeated to fill
    assert (three == star).all()
    assert (star != ring).any()


@pytest.mark.parametrize("remembered", [2048, 3, 2])
def test_equal_captions_of_a_unit_are_encoded_once(tmp_path, monkeypatch, remembered):
    """However many chunks lie between them, as far as the memory reaches."""
    texts, encoded = ["a star", "a ring", "a cross"], []
    real = TextEncoder.encode_and_count

    def counting(self, captions):
        encoded.extend(captions)
        return real(self, captions)

    monkeypatch.setattr(TextEncoder, "encode_and_count", counting)
    monkeypatch.setattr("prep.encode.captions.MEMO_CAPTIONS", remembered)
    files = []
    for number in range(12):
        files += [(f"{number:02d}.png", file_of(photo(number)))]
        files += [(f"{number:02d}.txt", texts[number % 3].encode())]
    tar = write_tar(tmp_path / "a.tar", files)
    cache = encode(tar, tmp_path / "cache", vae_batch_size=1, text_batch_size=1)
    assert encoded == (texts if remembered >= 3 else texts * 4)
    found = samples(cache)
    for number in range(3, 12):
        embeds = found[f"{number:02d}"].arrays["prompt_embeds"]
        assert (embeds == found[f"{number % 3:02d}"].arrays["prompt_embeds"]).all()
