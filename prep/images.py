"""Picture bytes to a square of pixels, with the numbers SDXL wants to know about it."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

# Named, because Pillow would hand some others (EPS) to programs of their own.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# A longer picture is cropped before it is enlarged: a line would fill the memory.
MAX_ASPECT = 16
MAX_PIXELS = 200_000_000  # a larger picture is rejected before it is decoded


class BadImage(Exception):
    """Why a picture cannot be used, in two or three words."""


@dataclass(frozen=True)
class Picture:
    """A prepared picture: `pixels` `[H, W, 3]` uint8 and its micro-conditioning."""

    pixels: NDArray[np.uint8]
    original_size: tuple[int, int]  # (height, width) as shown, before any resize
    crop: tuple[int, int]  # (top, left) in the resized picture

    @property
    def time_ids(self) -> tuple[int, ...]:
        """original_h, original_w, crop_top, crop_left, target_h, target_w (SDXL, section 2.2)."""
        return (*self.original_size, *self.crop, *self.pixels.shape[:2])


def prepare(data: bytes, resolution: int, center_crop: bool) -> Picture:
    """Decode, orient, flatten to RGB, resize the short side to `resolution`, crop a square.

    Raises BadImage.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            original = _shown_size(opened)
            image = _upright_rgb(opened, resolution)
    except (Image.DecompressionBombError, MemoryError):
        raise BadImage("too many pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error):
        raise BadImage("cannot be decoded") from None
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    top, left = ((height - resolution) // 2, (width - resolution) // 2) if center_crop else (0, 0)
    box = (left, top, left + resolution, top + resolution)
    if max(image.size) > MAX_ASPECT * min(image.size):
        sides = zip(box, 2 * image.size, strict=True)
        part = tuple(min(edge / scale, side) for edge, side in sides)
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=part)
    else:
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        image = image.crop(box)
    return Picture(np.asarray(image, dtype=np.uint8), original, (top, left))


def _shown_size(image: Image.Image) -> tuple[int, int]:
    """Height and width as a viewer shows the picture, which EXIF may have turned."""
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("too many pixels")
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def _upright_rgb(image: Image.Image, resolution: int) -> Image.Image:
    """First frame, upright, alpha laid on white, 8-bit RGB."""
    # JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the cost; keep twice the pixels we need.
    image.draft(None, (2 * resolution, 2 * resolution))
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or upright.mode == "I":
        levels = np.asarray(upright, dtype=np.float64) / 65535
        upright = Image.fromarray(np.uint8(np.rint(levels.clip(0, 1) * 255)))
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return upright.convert("RGB")
