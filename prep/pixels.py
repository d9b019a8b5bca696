"""Picture bytes to upright 8-bit sRGB pixels, whatever kind of picture they are."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

# Named, because Pillow would hand some others (EPS) to programs of their own.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 178_956_970  # where Pillow, too, speaks of a bomb
# A progressive JPEG may run over its pixels as often as it likes: a file of 1 MB can take hours.
MAX_SCANNED = 20_000_000_000
BIG = 2**26  # pixels from which pictures take turns: eight of them at once could fill the memory

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_BIG_PICTURES = threading.Lock()

# Oddities of single pictures, which would tear up the progress bar.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """Why a picture cannot be used, in a few words."""


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """The picture before its pixels are decoded. Raises BadImage, also where the body fails."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
            scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
            if pixels > MAX_PIXELS or pixels * scans > MAX_SCANNED:
                raise BadImage("too many pixels")
            with _BIG_PICTURES if pixels > BIG else nullcontext():
                yield image
    except BadImage:
        raise
    except (Image.DecompressionBombError, MemoryError):
        raise BadImage("too many pixels") from None
    except Exception:  # damaged files fail in Pillow's readers in every way there is
        raise BadImage("cannot be decoded") from None


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Height and width as a viewer shows the picture, which EXIF may have turned."""
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    turned = turned and image.format != "TIFF"  # whose size Pillow has turned already
    return (image.width, image.height) if turned else (image.height, image.width)


def upright_rgb(image: Image.Image, short: int) -> Image.Image:
    """First frame, upright, in sRGB, alpha laid on white, 8-bit RGB.

    A JPEG whose shorter side is much more than `short` is decoded smaller, to no less than twice
    `short`: at 1/2, 1/4 or 1/8 for a fraction of the cost.
    """
    image.draft(None, (2 * short, 2 * short))
    ImageOps.exif_transpose(image, in_place=True)
    profile = image.info.get("icc_profile")
    upright = _eight_bits(image)
    if profile:
        upright = _in_srgb(upright, profile)
    if upright.has_transparency_data:
        layer = upright if upright.mode == "RGBA" else upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return upright.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits (which Pillow may hand over as 32) as one of 8, rounded."""
    if not (image.mode.startswith("I;16") or image.mode == "I"):
        return image
    levels = np.asarray(image).clip(0, 65535).astype(np.uint32)
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The picture's colours converted from its profile, its alpha kept."""
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    transform = _transform(profile, mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    assert converted is not None
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """To sRGB, perceptual; None for a broken profile and for one that is sRGB itself."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(
            source, SRGB, mode, "RGB", ImageCms.Intent.PERCEPTUAL
        )  # refuses a profile of other colours than the picture's
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return None if mode == "RGB" and _changes_nothing(transform) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Is every colour of a grid left where it is, but for rounding? Most profiles are sRGB's."""
    levels = np.linspace(0, 255, 18, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform))
    return bool(np.abs(moved.astype(int) - grid).max() <= 1)
