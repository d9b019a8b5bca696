"""Writes pictures: the only place in `train` that knows PIL."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from shared.storage.files import publish
from shared.storage.typed_json import record_of

MIN_TILE = 96  # pixels; smaller pictures are enlarged by a whole factor
GAP = 4
HEADER = 34
FONT_SIZE = 13
GRID = "distillery.grid"  # a PNG's text: its `Grid` as JSON


@dataclass(frozen=True)
class Grid:
    """Where the pictures of a sheet are, and what stands above and below them."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    width: int  # of a picture, in its own pixels
    height: int
    zoom: int  # of the sheet's pixels make one of those

    @property
    def sheet_size(self) -> tuple[int, int]:
        """Width and height of the whole sheet."""
        left, top, _, _ = self.box(len(self.labels), len(self.columns))
        return left, top

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a picture in the sheet."""
        width, height = self.zoom * self.width, self.zoom * self.height
        left, top = GAP + column * (width + GAP), HEADER + row * (height + HEADER - 12)
        return left, top, left + width, top + height


def grid_of(text: object, size: tuple[int, int]) -> Grid | None:
    """The grid of a sheet of this size, from its PNG's text; None where that does not tell it."""
    try:
        grid = record_of(Grid, json.loads(text if isinstance(text, str) else ""))
    except (ValueError, RecursionError):
        return None
    sides = min(grid.width, grid.height, grid.zoom)
    return grid if sides > 0 and grid.sheet_size == tuple(size) else None


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
    rows, columns, labels = [[*row] for row in rows], tuple(columns), tuple(labels)
    height, width = rows[0][0].shape[:2]
    grid = Grid(columns, labels, width, height, zoom=max(1, -(-MIN_TILE // height)))
    font = ImageFont.load_default(FONT_SIZE)
    sheet = Image.new("RGB", grid.sheet_size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        left, _, right, _ = grid.box(0, column)
        lines = "\n".join(fitted(line, right - left, font) for line in title.splitlines())
        pen.multiline_text((left, 2), lines, "black", font, spacing=1)
    for row, (pictures, label) in enumerate(zip(rows, labels, strict=True)):
        for column, picture in enumerate(pictures):
            left, top, right, bottom = grid.box(row, column)
            size = (right - left, bottom - top)
            tile = Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)
            sheet.paste(tile, (left, top))
        text = fitted(label, sheet.width - 2 * GAP, font)
        pen.text((GAP, grid.box(row, 0)[3] + 2), text, "black", font)
    write_picture(path, np.asarray(sheet), tmp, grid)
    return np.asarray(sheet)


def write_picture(
    path: Path, pixels: NDArray[np.uint8], tmp: Path | None = None, grid: Grid | None = None
) -> None:
    """A PNG of `[H, W, 3]`, which tells the grid of a sheet."""
    buffer, told = io.BytesIO(), PngInfo()
    if grid is not None:
        told.add_text(GRID, json.dumps(asdict(grid)))
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True, pnginfo=told)
    publish([buffer.getvalue()], path, tmp or path.parent)


def fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
