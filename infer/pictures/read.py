"""Pictures that are given: read as `prep` reads them, and cut to the size that is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from prep.images.crop import Framing, prepare
from prep.images.decode import BadImage, opened, shown_size, upright_rgb
from shared.errors import UserError
from shared.storage.reading import read_file

Size = tuple[int, int]  # width, height
OPENCV = "pip install opencv-python-headless"
CANNY = (100, 200)  # thresholds that the ControlNets for edges were trained with


def picture_size(path: Path, flag: str) -> Size:
    """Width and height of a picture as it is shown. Raises UserError for what is none."""
    try:
        with opened(content(path, flag)) as image:
            height, width = shown_size(image)
            return width, height
    except BadImage as error:
        raise unusable(path, flag, error) from None


def read_picture(path: Path, flag: str, size: Size | None = None) -> Image.Image:
    """A picture in upright sRGB, filling `size`: resized, and cropped at its middle.

    Raises UserError for what is none.
    """
    try:
        with opened(content(path, flag)) as image:
            picture = upright_rgb(image, max(size) if size else max(image.size))
    except BadImage as error:
        raise unusable(path, flag, error) from None
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS) if size else picture


def checked(path: Path, flag: str) -> bytes:
    """A picture's bytes, decoded to their end. Raises UserError for what is none."""
    data = content(path, flag)
    try:
        with opened(data) as image:
            upright_rgb(image, max(image.size))
    except BadImage as error:
        raise unusable(path, flag, error) from None
    return data


def framed(data: bytes, side: int) -> NDArray[np.uint8]:
    """The pixels `[side, side, 3]` that `prep` would encode of a picture, cut out of its middle."""
    return prepare(data, Framing(side))[0].pixels


def read_mask(path: Path, size: Size) -> Image.Image:
    """A mask in grey: white is drawn anew, black stays. Raises UserError for what is no picture."""
    return read_picture(path, "--mask", size).convert("L")


def edges(picture: Image.Image) -> Image.Image:
    """White edges on black, by OpenCV's Canny. Raises UserError where OpenCV is not installed."""
    try:
        import cv2
    except ImportError:
        raise UserError(f"--canny needs OpenCV: {OPENCV}") from None
    found: Any = cv2.Canny(np.asarray(picture.convert("L")), *CANNY)
    return Image.fromarray(np.repeat(found[:, :, None], 3, axis=2))


def content(path: Path, flag: str) -> bytes:
    """A file's bytes. Raises UserError, naming the flag, where it is not there."""
    if not path.exists():
        raise UserError(f"{flag} {path} is not there; check the path")
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; give one picture's file")
    return read_file(path)


def unusable(path: Path, flag: str, error: BadImage) -> UserError:
    """Why a file cannot be used as a picture."""
    return UserError(f"{flag} {path} is no picture that can be used: {error}")
