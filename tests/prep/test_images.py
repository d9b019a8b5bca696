"""What becomes of a picture's bytes: every kind of picture, colours, resizing, and bombs."""

import contextlib
import io
import time

import numpy as np
import pytest
from PIL import Image, ImageCms

from prep.images.crop import BadImage, Framing, prepare
from tests.support.pictures import ADOBE, BOMBS, LINEAR_GREY
from tests.support.sources import (
    SIDE,
    accounts,
    encode,
    file_of,
    photo,
    refusal,
    samples,
    write_tar,
)

SRGB = ImageCms.createProfile("sRGB")


def prepared(content, side=SIDE):
    (picture,) = prepare(content, Framing(side))
    return picture.pixels


def reason(content):
    with pytest.raises(BadImage) as error:
        prepare(content, Framing(SIDE))
    return str(error.value)


# --- colour profiles ----------------------------------------------------------------------------


PHOTO = photo(1, SIDE, SIDE)


def by_lcms(image, profile):
    """The picture in sRGB, by ImageCms at its simplest."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    perceptual = ImageCms.Intent.PERCEPTUAL
    return np.asarray(ImageCms.profileToProfile(image, source, SRGB, perceptual, "RGB"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_an_embedded_profile_is_converted_to_srgb(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    found = prepared(file_of(PHOTO, kind, icc_profile=ADOBE, **options))
    assert (found == by_lcms(PHOTO, ADOBE)).all()
    assert np.abs(found.astype(int) - np.asarray(PHOTO)).max() > 10


def test_the_profile_of_a_jpeg():
    content = file_of(PHOTO, "JPEG", icc_profile=ADOBE, quality=95)
    assert (prepared(content) == by_lcms(Image.open(io.BytesIO(content)), ADOBE)).all()


def test_adobe_green_is_out_of_srgb_and_a_colour_inside_is_known():
    """(200, 100, 50) of Adobe RGB is (230, 98, 41) in sRGB, by the standards' own formulas."""
    found = prepared(file_of(Image.new("RGB", (SIDE, SIDE), (200, 100, 50)), icc_profile=ADOBE))
    linear = (np.array([200, 100, 50]) / 255) ** 2.2
    to_xyz = [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]
    to_srgb = [[3.24045, -1.53714, -0.49853], [-0.96927, 1.87601, 0.04156],
               [0.05564, -0.20403, 1.05723]]  # fmt: skip
    shown = np.array(to_srgb) @ np.array(to_xyz) @ linear
    shown = 255 * np.where(shown > 0.0031308, 1.055 * shown ** (1 / 2.4) - 0.055, 12.92 * shown)
    assert np.abs(found[0, 0] - shown).max() < 2.5


def test_a_profile_beside_alpha_palette_and_grey():
    faded = PHOTO.copy()
    faded.putalpha(photo(2, SIDE, SIDE).convert("L"))
    shown = Image.fromarray(by_lcms(PHOTO, ADOBE)).convert("RGBA")
    shown.putalpha(faded.getchannel("A"))
    white = Image.new("RGBA", shown.size, "white")
    wanted = np.asarray(Image.alpha_composite(white, shown).convert("RGB"))
    assert (prepared(file_of(faded, icc_profile=ADOBE)) == wanted).all()

    palette = PHOTO.quantize(32)
    found = prepared(file_of(palette, icc_profile=ADOBE))
    assert (found == by_lcms(palette.convert("RGB"), ADOBE)).all()

    grey = PHOTO.convert("L")
    found = prepared(file_of(grey, icc_profile=LINEAR_GREY))
    assert (found == by_lcms(grey, LINEAR_GREY)).all()
    assert found.mean() > np.asarray(grey).mean() + 20  # linear light is darker than it looks


@pytest.mark.parametrize("profile", [b"no profile", ADOBE[:200], LINEAR_GREY, bytes(500)])
def test_a_broken_profile_or_one_of_other_colours_is_ignored(profile):
    assert (prepared(file_of(PHOTO, icc_profile=profile)) == np.asarray(PHOTO)).all()


def test_an_srgb_profile_changes_nothing():
    content = file_of(PHOTO, icc_profile=ImageCms.ImageCmsProfile(SRGB).tobytes())
    assert (prepared(content) == np.asarray(PHOTO)).all()


# --- resizing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("times", [4, 7.3])
def test_shrinking_does_not_alias(kind, times):
    """Stripes finer than the result can show become grey, not coarser stripes."""
    side = round(SIDE * times)
    x = np.arange(side)
    stripes = np.where(x // 2 % 2 == 0, 255, 0).astype(np.uint8)
    picture = Image.fromarray(np.broadcast_to(stripes, (side, side)).copy()).convert("RGB")
    found = prepared(file_of(picture, kind)).astype(int)[4:-4, 4:-4]
    assert np.ptp(found) <= 24
    assert abs(found.mean() - 127.5) < 3


# --- nasty pictures, through the real command -----------------------------------------------------


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_a_rejected_picture(name):
    content, why = BOMBS[name]
    start = time.process_time()
    assert reason(content) == why
    assert time.process_time() - start < 2


def test_any_damage_is_a_rejected_picture():
    """Bytes changed at random: some picture or a reason, never an exception of Pillow's own."""
    rng = np.random.default_rng(0)
    kinds = {
        "JPEG": {"exif": Image.Exif(), "icc_profile": ADOBE}, "PNG": {"icc_profile": ADOBE},
        "GIF": {}, "WEBP": {}, "TIFF": {"compression": "tiff_lzw"}, "BMP": {},
    }  # fmt: skip
    decoded = 0
    for kind, options in kinds.items():
        content = file_of(photo(3, 40, 30), kind, **options)
        for _ in range(60):
            damaged = np.frombuffer(content, np.uint8).copy()
            reach = rng.choice([64, len(damaged)])
            damaged[rng.integers(0, reach, 3)] = rng.integers(0, 256, 3)
            with contextlib.suppress(BadImage):
                decoded += prepared(damaged.tobytes(), 16).shape == (16, 16, 3)
    assert decoded > 50


def transparent_palette():
    image = Image.new("P", (SIDE, SIDE))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, SIDE // 2, SIDE))
    return file_of(image, transparency=bytes([0, 255]))


def animation(kind):
    frames = [photo(n, SIDE, SIDE) for n in (1, 2, 3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    return file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def first_frame(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


LEVELS = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
BLUE_WHITE = np.full((SIDE, SIDE, 3), 255, np.uint8)
BLUE_WHITE[:, : SIDE // 2, :2] = 0
TEAL = (9, 99, 199)
GOOD = {
    "1x1": (file_of(Image.new("RGB", (1, 1), TEAL)), np.full((SIDE, SIDE, 3), TEAL)),
    "1x20000": (file_of(Image.new("RGB", (1, 20_000), TEAL)), np.full((SIDE, SIDE, 3), TEAL)),
    "cmyk": (
        file_of(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG", quality=100),
        np.full((SIDE, SIDE, 3), (255, 0, 0)),
    ),
    "cmyk with an RGB profile": (
        file_of(Image.new("CMYK", (SIDE, SIDE)), "JPEG", icc_profile=ADOBE),
        np.full((SIDE, SIDE, 3), 255),
    ),
    "16 bit": (file_of(Image.fromarray(LEVELS)), (LEVELS / 257).round()[..., None].repeat(3, 2)),
    "palette": (transparent_palette(), BLUE_WHITE),
    "gif": (animation("GIF"), first_frame(animation("GIF"))),
    "webp": (animation("WEBP"), np.asarray(photo(1, SIDE, SIDE))),
}  # fmt: skip


def test_the_nasty_set_through_encode(tmp_path):
    """The latents of odd pictures are those of plain PNGs of what they show."""
    odd, plain = [], []
    for key, (content, shown) in GOOD.items():
        odd += [(f"{key}.png", content), (f"{key}.txt", b"a")]
        picture = file_of(Image.fromarray(np.asarray(shown).astype(np.uint8)))
        plain += [(f"{key}.png", picture), (f"{key}.txt", b"a")]
    for key, (content, _) in BOMBS.items():
        odd += [(f"{key}.png", content), (f"{key}.txt", b"a")]
    cache = encode(write_tar(tmp_path / "odd.tar", odd), tmp_path / "cache")
    expected = samples(encode(write_tar(tmp_path / "plain.tar", plain), tmp_path / "expected"))
    found = samples(cache)
    assert set(found) == set(GOOD)
    for key, sample in found.items():
        wanted = expected[key].arrays["latents"].astype(float)
        tolerance = 0.05 if key == "cmyk" else 1e-6  # JPEG rounds
        assert np.abs(sample.arrays["latents"] - wanted).max() <= tolerance, key
    reasons = {row["source_key"]: row["reason"] for row in accounts(cache)}
    assert {key: reasons[key] for key in BOMBS} == {key: why for key, (_, why) in BOMBS.items()}


def test_min_size_rejects_by_the_shorter_side(tmp_path):
    sizes = {"small": (99, 300), "right": (100, 300), "turned": (300, 99)}
    files = [
        file
        for key, size in sizes.items()
        for file in ((f"{key}.png", file_of(photo(1, *size))), (f"{key}.txt", b"a"))
    ]
    tar = write_tar(tmp_path / "a.tar", files)
    cache = encode(tar, tmp_path / "cache", min_size=100, max_reject_fraction=1.0)
    reasons = {row["source_key"]: row["reason"] for row in accounts(cache)}
    small = "smaller than --min-size"
    assert reasons == {"small": small, "right": "", "turned": small}
    words = ["encode", "--shards", tar, "--model", "tiny-sd", "--cache", cache, "--threads", 1]
    assert "min_size is 100 there, 0 here" in refusal(*words)
    assert "--min-size -1 must be at least 0" in refusal(*words, "--min-size", -1)


TURNS = {  # how a viewer turns what is stored
    1: [], 2: ["FLIP_LEFT_RIGHT"], 3: ["ROTATE_180"], 4: ["FLIP_TOP_BOTTOM"], 5: ["TRANSPOSE"],
    6: ["ROTATE_270"], 7: ["TRANSVERSE"], 8: ["ROTATE_90"],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_large_turned_picture_is_shown_upright(orientation, kind):
    """A JPEG is decoded at half its size here, so the turn and the short cut must agree."""
    stored = photo(4, 400, 300)
    tags = Image.Exif()
    tags[0x0112] = orientation
    (picture,) = prepare(file_of(stored, kind, exif=tags), Framing(SIDE))
    shown = stored
    for turn in TURNS[orientation]:
        shown = shown.transpose(Image.Transpose[turn])
    assert picture.original_size == (shown.height, shown.width)
    wanted = prepared(file_of(shown)).astype(int)
    assert np.abs(picture.pixels - wanted).mean() < 2.5
