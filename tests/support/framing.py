"""Pictures of every orientation, and the squares that a cache holds of them."""

import numpy as np
from PIL import Image

from tests.support.sources import (
    SIDE,
)


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


def squared(image, side=SIDE, corner=False):
    """Short side to `side`, then the central (or top left) square."""
    scale = side / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    top, left = (0, 0) if corner else ((height - side) // 2, (width - side) // 2)
    return pixels[top : top + side, left : left + side]
