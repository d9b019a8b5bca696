"""Pictures that are drawn: PNG files that say how, and a contact sheet."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shared.storage.files import publish
from train.sampling.pictures import write_grid

THUMBNAIL = 256  # pixels of the longer side, on a contact sheet


def write_drawn(path: Path, pixels: NDArray[np.uint8], told: Mapping[str, str]) -> None:
    """Write a PNG of `[H, W, 3]` with text chunks, whole or not at all."""
    info = PngInfo()
    for name, text in told.items():
        info.add_text(name, text)  # tEXt, or iTXt where Latin-1 does not do
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    publish([buffer.getvalue()], path, path.parent)


def write_sheet(
    path: Path,
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    columns: Sequence[str],
    labels: Sequence[str],
) -> None:
    """Write all pictures, small, a row for each prompt."""
    write_grid(path, [[thumbnail(one) for one in row] for row in rows], columns, labels)


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture no larger than THUMBNAIL."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return np.asarray(image)
