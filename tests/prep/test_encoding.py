"""What is encoded is right: against plain diffusers, plain transformers, and PIL used by hand."""

import io

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from safetensors.numpy import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from prep.encoders.text import TextEncoder
from prep.images.crop import Framing, prepare
from tests.support.sources import (
    SIDE,
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


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def stored(image, orientation):
    """`image` as a camera stores it that says `orientation`; the list is EXIF's own."""
    pixels = np.asarray(image)  # row 0 is the top of what is shown
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, 1),  # the camera's 0th row is the shown right side
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, -1),
    }[orientation]
    return Image.fromarray(np.ascontiguousarray(turned))


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


def squared(image, side=SIDE, corner=False):
    """Short side to `side`, then the central (or top left) square."""
    scale = side / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    top, left = (0, 0) if corner else ((height - side) // 2, (width - side) // 2)
    return pixels[top : top + side, left : left + side]


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    shown = photo(5, 90, 70)
    content = file_of(stored(shown, orientation), exif=exif(orientation))
    (picture,) = prepare(content, Framing(SIDE))
    assert picture.original_size == (70, 90)
    assert (picture.pixels == squared(shown)).all()


def test_a_large_jpeg_may_be_decoded_smaller_but_looks_the_same():
    content = file_of(photo(6, 1000, 700), "JPEG", quality=95)
    (picture,) = prepare(content, Framing(SIDE))
    assert picture.original_size == (700, 1000)
    whole = squared(Image.open(io.BytesIO(content)).convert("RGB"))
    difference = np.abs(picture.pixels.astype(int) - whole.astype(int))
    assert difference.mean() < 1
    assert difference.max() < 12


GREY = np.linspace(0, 255, SIDE * SIDE).reshape(SIDE, SIDE)
HALF_RED = np.dstack([np.full((SIDE, SIDE), c, np.uint8) for c in (255, 0, 0, 128)])
CMYK_RED = Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))


def palette(**options):
    image = Image.new("P", (SIDE, SIDE))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, SIDE // 2, SIDE))
    return file_of(image, "PNG", **options)


def two_halves(left, right):
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    pixels[:, : SIDE // 2], pixels[:, SIDE // 2 :] = left, right
    return pixels


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        pytest.param(
            file_of(Image.fromarray(GREY.astype(np.uint8))), GREY.astype(np.uint8), id="grey"
        ),
        pytest.param(
            file_of(Image.fromarray((GREY * 257).astype(np.uint16))), GREY, id="16-bit grey PNG"
        ),
        pytest.param(
            file_of(Image.fromarray((GREY * 257).astype(np.uint16)), "TIFF"), GREY, id="16-bit TIFF"
        ),
        pytest.param(file_of(Image.fromarray(HALF_RED)), (255, 127, 127), id="alpha on white"),
        pytest.param(
            file_of(Image.new("LA", (SIDE, SIDE), (0, 0))), (255, 255, 255), id="transparent grey"
        ),
        pytest.param(palette(), two_halves((0, 0, 255), (255, 0, 0)), id="palette"),
        pytest.param(
            palette(transparency=0), two_halves((0, 0, 255), (255, 255, 255)), id="transparent"
        ),
        pytest.param(file_of(Image.new("1", (SIDE, SIDE), 1)), (255, 255, 255), id="1 bit"),
        pytest.param(file_of(CMYK_RED, "TIFF"), (255, 0, 0), id="CMYK TIFF"),
        pytest.param(file_of(CMYK_RED, "JPEG", quality=100), (255, 0, 0), id="CMYK JPEG"),
    ],
)
def test_every_kind_of_picture_becomes_8_bit_rgb(content, shown):
    (picture,) = prepare(content, Framing(SIDE))
    if np.ndim(shown) == 2:
        shown = np.repeat(np.asarray(shown)[..., None], 3, axis=2)
    expected = np.broadcast_to(np.asarray(shown, dtype=float), (SIDE, SIDE, 3))
    assert picture.pixels.dtype == np.uint8
    assert np.abs(picture.pixels - expected).max() <= 2


def test_the_first_frame_of_an_animation():
    first, second = photo(8), photo(9)
    content = file_of(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    assert (prepare(content, Framing(SIDE))[0].pixels == squared(first)).all()
