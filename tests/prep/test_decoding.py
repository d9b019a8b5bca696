"""Pictures become the pixels that PIL, used by hand, makes of them."""

import io

import numpy as np
import pytest
from PIL import Image

from prep.images.crop import Framing, prepare
from tests.support.framing import exif, squared, stored
from tests.support.sources import (
    SIDE,
    file_of,
    photo,
)


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
