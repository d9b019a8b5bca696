"""Writes pictures: the only place in `train` that knows PIL."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shared.storage.files import publish

MIN_TILE = 96  # pixels; smaller pictures are enlarged by a whole factor
GAP = 4
HEADER = 34
FONT_SIZE = 13


def write_grid(
    path: Path,
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    columns: Sequence[str],
    labels: Sequence[str],
    tmp: Path | None = None,
) -> NDArray[np.uint8]:
    """A PNG of pictures `[H, W, 3]` under column titles, each row under its label.

    It is written by way of the folder `tmp`; beside `path` unless given.
    """
    zoom = max(1, -(-MIN_TILE // rows[0][0].shape[0]))
    height, width = (zoom * side for side in rows[0][0].shape[:2])
    font = ImageFont.load_default(FONT_SIZE)
    sheet = Image.new(
        "RGB",
        (GAP + len(columns) * (width + GAP), HEADER + len(rows) * (height + HEADER - 12)),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        lines = "\n".join(fitted(line, width, font) for line in title.splitlines())
        pen.multiline_text((GAP + column * (width + GAP), 2), lines, "black", font, spacing=1)
    for row, (pictures, label) in enumerate(zip(rows, labels, strict=True)):
        top = HEADER + row * (height + HEADER - 12)
        for column, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (GAP + column * (width + GAP), top))
        pen.text((GAP, top + height + 2), fitted(label, sheet.width - 2 * GAP, font), "black", font)
    write_picture(path, np.asarray(sheet), tmp)
    return np.asarray(sheet)


def write_picture(path: Path, pixels: NDArray[np.uint8], tmp: Path | None = None) -> None:
    """A PNG of `[H, W, 3]`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    publish([buffer.getvalue()], path, tmp or path.parent)


def fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
