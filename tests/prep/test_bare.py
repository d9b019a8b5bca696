"""Pixels that are fine are read, whatever is broken in what is said about them."""

import io

import numpy as np
import pytest
from PIL import Image

from prep.images.crop import BadImage, Framing, prepare
from tests.support.pictures import chunk

COLOURS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(COLOURS).save(file, kind, quality=95)
    return file.getvalue()


def with_segment(marker: int, content: bytes) -> bytes:
    whole = saved("JPEG")
    return (
        whole[:2]
        + bytes([0xFF, marker])
        + (len(content) + 2).to_bytes(2, "big")
        + content
        + whole[2:]
    )


@pytest.mark.parametrize("name", ["gAMA", "cHRM", "sRGB", "pHYs", "tRNS", "acTL", "eXIf", "tIME"])
@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 7])
def test_a_png_with_a_broken_chunk(name, content):
    whole = saved("PNG")
    broken = whole[:33] + chunk(name.encode(), content) + whole[33:]
    (picture,) = prepare(broken, Framing(64))
    assert np.array_equal(picture.pixels, COLOURS)


@pytest.mark.parametrize(
    ("marker", "content"),
    [(0xE0, b"JFIF\0"), (0xE0, b"JFIF\0\1"), (0xEE, b"Adobe"), (0xEE, b"Adobe\0d"),
     (0xE1, b"Exif\0\0MM"), (0xE2, b"MPF\0"), (0xED, b"Photoshop 3.0\x008BIM")],
)  # fmt: skip
def test_a_jpeg_with_a_broken_segment(marker, content):
    (whole,) = prepare(saved("JPEG"), Framing(64))
    (picture,) = prepare(with_segment(marker, content), Framing(64))
    assert np.array_equal(picture.pixels, whole.pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pixels_that_are_broken_are_no_picture(kind):
    with pytest.raises(BadImage, match="cannot be decoded"):
        prepare(saved(kind)[:200], Framing(64))
