"""Picture bytes to upright 8-bit sRGB pixels, whatever kind of picture they are."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, ExifTags, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

from prep.images.kinds import HEAD_BYTES, Sort, kind_of, why_no_picture

# Named, because Pillow would hand some others (EPS) to programs of their own, has readers that few
# have tried to break (FLI, PSD), and takes tables of numbers (FITS, GRIB) for pictures.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "DDS",
)  # fmt: skip
UNDECODABLE = "cannot be decoded"
HEIF_MISSING = "HEIC needs another package: pip install 'latent-distillery[heif]'"
RAW = "camera raw is not read: convert it to PNG or JPEG"
ODD_TIFF = "TIFF that cannot be decoded: save it as PNG, or as TIFF of 8 or 16 bits"
ODD_LEVELS = "numbers whose black and white cannot be told: save it with 8 or 16 bits"
MAX_PIXELS = 178_956_970  # where Pillow, too, speaks of a bomb
# A progressive JPEG may run over its pixels as often as it likes: a file of 1 MB can take hours.
MAX_SCANNED = 20_000_000_000
BIG = 2**26  # pixels from which pictures take turns: eight of them at once could fill the memory

TOO_MANY = "too many pixels"
NEW_SUBFILE_TYPE, PHOTOMETRIC, SUB_IFDS, DNG_VERSION = 254, 262, 330, 50706  # tags of TIFF
TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_BIG_PICTURES = threading.Lock()

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a picture: several are decoded at a time

# Oddities of single pictures, which would tear up the progress bar.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class BadImage(Exception):
    """Why a picture cannot be used, in a few words."""


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Open a picture of whatever kind its bytes are; its pixels are not decoded yet.

    Raises BadImage, also where the body runs out of memory.
    """
    with _open(data) as image:
        pixels = image.width * image.height
        scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
        if pixels > MAX_PIXELS or pixels * scans > MAX_SCANNED:
            raise BadImage(TOO_MANY)
        if _is_camera_raw(image):
            raise BadImage(RAW)
        with _BIG_PICTURES if pixels > BIG else nullcontext():
            try:
                yield image
            except MemoryError:
                raise BadImage(TOO_MANY) from None


def _open(data: bytes) -> Image.Image:
    formats = (*FORMATS, "HEIF") if reads_heif() else FORMATS
    with _pillows_errors():
        try:
            return Image.open(io.BytesIO(data), formats=formats)
        except UnidentifiedImageError:
            kind = kind_of(data[:HEAD_BYTES])
            if kind is not None and kind.name == "Targa":  # which any bytes may look like
                return Image.open(io.BytesIO(data), formats=("TGA",))
    if kind is not None and kind.sort is Sort.HEIF:
        raise BadImage(UNDECODABLE if reads_heif() else HEIF_MISSING)
    if kind is not None and kind.name == "TIFF":
        raise BadImage(ODD_TIFF)
    raise BadImage(why_no_picture(data[:HEAD_BYTES]))


@contextmanager
def _pillows_errors() -> Iterator[None]:
    """Raise what Pillow's readers raise as BadImage. Stands around calls of theirs only."""
    try:
        yield
    except (Image.DecompressionBombError, MemoryError):
        raise BadImage(TOO_MANY) from None
    except Exception:  # damaged files fail in the readers in every way there is
        raise BadImage(UNDECODABLE) from None


@lru_cache(maxsize=1)
def reads_heif() -> bool:
    """Is the extra `heif` installed? Then Pillow reads HEIC from now on."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(
        decode_threads=1, thumbnails=False, depth_images=False, aux_images=False
    )
    return True


def _is_camera_raw(image: Image.Image) -> bool:
    """Is it a TIFF whose pixels are a camera's (DNG), or whose first ones are a preview (NEF)?"""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    tags = image.tag_v2
    preview = tags.get(NEW_SUBFILE_TYPE) == 1 and SUB_IFDS in tags
    return DNG_VERSION in tags or preview


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Height and width as a viewer shows the picture, which EXIF may have turned."""
    turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def _orientation(image: Image.Image) -> object:
    """As EXIF says; 1 where it says nothing, or is broken: the pixels may still be good."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as above: a damaged one fails in every way there is
        return 1


def upright_rgb(image: Image.Image, short: int) -> Image.Image:
    """First frame, upright, in sRGB, alpha laid on white, 8-bit RGB.

    A JPEG whose shorter side is much more than `short` is decoded smaller, to no less than twice
    `short`: at 1/2, 1/4 or 1/8 for a fraction of the cost.
    """
    with _pillows_errors():
        if image.format in ("JPEG", "MPO"):  # others would take a thumbnail for it
            image.draft(None, (2 * short, 2 * short))
        image.load()  # turns a TIFF
    orientation = 1 if image.format == "TIFF" else _orientation(image)
    profile = image.info.get("icc_profile")
    upright = _eight_bits(image)
    if orientation in TURNS:
        upright = upright.transpose(TURNS[orientation])
    if profile:
        upright = _in_srgb(upright, profile)
    if image.format == "TGA" and upright.mode == "RGBA" and not upright.getchannel("A").getbbox():
        upright = upright.convert("RGB")  # a fourth channel that means nothing
    if upright.has_transparency_data:
        layer = upright if upright.mode == "RGBA" else upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return upright.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Round a grey picture of more bits, or of floating point numbers, to 8 bits.

    16 bits are a range of 65,535. Otherwise the numbers tell which they are meant to fill: 0 to 1,
    0 to 255 or 0 to 65,535. Raises BadImage where they do not.
    """
    sixteen = image.mode.startswith("I;16")
    if not (sixteen or image.mode in ("I", "F")):
        return image
    levels = np.asarray(image).astype(np.float32)
    white = 65535.0
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        white = _white(levels)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == 0:
        levels = white - levels  # 0 is white, which Pillow knows of 8 bits only
    np.clip(levels, 0, white, out=levels)
    levels *= 255 / white
    levels += 0.5
    return Image.fromarray(levels.astype(np.uint8))


def _white(levels: NDArray[np.float32]) -> float:
    """Which number is white; a tenth more or less may come of resizing. Raises BadImage."""
    low, high = float(levels.min()), float(levels.max())
    if not np.isfinite([low, high]).all():
        raise BadImage("numbers that are infinite or NaN: save it with 8 or 16 bits")
    # Between them (an HDR picture, a sensor of 12 bits) any choice would be nearly black or white.
    for white, least in ((1.0, 0.0), (255.0, 16.0), (65535.0, 4096.0)):
        if least <= high <= 1.1 * white and low >= -0.1 * white:
            return white
    raise BadImage(ODD_LEVELS)


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert the picture's colours from its profile, and keep its alpha."""
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
        # Refuses a profile of other colours than the picture's.
        transform = ImageCms.buildTransform(source, SRGB, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return None if mode == "RGB" and _changes_nothing(transform) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Is every colour of a grid left where it is, but for rounding? Most profiles are sRGB's."""
    levels = np.linspace(0, 255, 18, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform))
    return bool(np.abs(moved.astype(int) - grid).max() <= 1)
