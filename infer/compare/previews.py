"""Previews of runs as pictures of a page: cut out of their sheets, made smaller until they fit."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from infer.compare.records import Record
from train.sampling.pictures import GRID, Grid, grid_of

FOLDER = "previews"
BUDGET = 5_500_000  # characters of all pictures in a page
# A picture's longest side in pixels, and how many steps of a run are shown: the first that fits.
PLANS = ((320, 40), (256, 24), (192, 16), (128, 16), (128, 8), (96, 8), (96, 4), (64, 2), (48, 1))
QUALITY = 82
FAR = 100  # times max_train_steps (which a resumed run may lower): no step of this run
TOLD = 3  # steps that are named
WHOLE = 3  # pictures' sides are that of an old sheet, which does not tell where its pictures are


@dataclass(frozen=True)
class Sheet:
    """A run's preview at a step: pictures as data URIs, by column and row of the sheet."""

    step: int
    columns: tuple[str, ...]  # such as `4 steps`; none where the sheet is shown as it is
    prompts: tuple[str, ...]
    pictures: tuple[tuple[str, ...], ...]  # [columns][prompts]; of an old sheet the one picture
    side: int  # of a picture as it was drawn, in pixels

    @property
    def size(self) -> int:
        """Characters of its pictures."""
        return sum(len(uri) for column in self.pictures for uri in column)


@dataclass(frozen=True)
class Gallery:
    """The previews of all runs, oldest first, and what of them is not shown."""

    runs: tuple[tuple[Sheet, ...], ...]
    left_out: str = ""

    @property
    def steps(self) -> list[int]:
        """All steps at which some run has a preview."""
        return sorted({sheet.step for sheets in self.runs for sheet in sheets})


def gallery_of(records: Sequence[Record], budget: int = BUDGET) -> Gallery:
    """The previews of runs, as large and as many as the budget of characters allows."""
    files, beyond = [], list[str]()
    for record in records:
        there = preview_files(record.folder)
        last = FAR * max(record.config.max_train_steps, record.reached)
        files.append([path for path in there if step_of(path) <= last])
        beyond += steps_left_out(record, "beyond its training", there[len(files[-1]) :])
    for side, most in PLANS:
        wanted = [spread(one, most) for one in files]
        last = sum(len(one) * sheet_of(one[-1], side).size for one in wanted if one)
        if last > 1.5 * budget:  # no need to draw the others
            continue
        drawn = [[sheet_of(path, side) for path in one] for one in wanted]
        if sum(sheet.size for sheets in drawn for sheet in sheets) <= budget:
            runs = tuple(tuple(one for one in sheets if one.pictures) for sheets in drawn)
            small = left_out(drawn, [len(one) for one in files], side)
            return Gallery(runs, "; ".join([*small, *unreadable(records, wanted, drawn), *beyond]))
    large = "the previews, which would make the page too large"
    return Gallery(((),) * len(files), "; ".join([large, *beyond]))


def unreadable(
    records: Sequence[Record], wanted: Sequence[Sequence[Path]], drawn: Sequence[Sequence[Sheet]]
) -> list[str]:
    """Which previews are damaged, in words."""
    told = []
    for record, paths, sheets in zip(records, wanted, drawn, strict=True):
        damaged = [path for path, one in zip(paths, sheets, strict=True) if not one.pictures]
        told += steps_left_out(record, "that cannot be read", damaged)
    return told


def steps_left_out(record: Record, why: str, paths: Sequence[Path]) -> list[str]:
    """A phrase about a run's previews that are not shown; none where all are."""
    if not paths:
        return []
    steps = ", ".join(str(step_of(path)) for path in paths[:TOLD])
    more = f" and {len(paths) - TOLD:,} more" if len(paths) > TOLD else ""
    return [
        f"previews of {record.name} {why} ({'step' if len(paths) < 2 else 'steps'} {steps}{more})"
    ]


def preview_files(run: Path) -> list[Path]:
    """A run's previews, by step."""
    found = (run / FOLDER).glob("step-*.png")
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.stem)), key=step_of)


def step_of(path: Path) -> int:
    """The step of a preview."""
    return int(path.stem.removeprefix("step-"))


def spread(files: Sequence[Path], most: int) -> list[Path]:
    """At most so many of the files, evenly, the last among them, and the first if there is room."""
    if len(files) <= most:
        return list(files)
    places = np.linspace(len(files) - 1, 0, most).round().astype(int)
    return [files[place] for place in sorted(set(places.tolist()))]


def left_out(runs: Sequence[Sequence[Sheet]], there: Sequence[int], side: int) -> list[str]:
    """What of the previews is not shown for its size, in words; none where all of it is."""
    told = []
    shown = sum(map(len, runs))
    if shown < sum(there):
        told.append(f"{sum(there) - shown:,} of {sum(there):,} previews")
    if any(sheet.side > side for sheets in runs for sheet in sheets if sheet.columns):
        told.append(f"detail of pictures larger than {side} pixels")
    return [f"{' and '.join(told)}, so that the page stays small"] if told else []


def sheet_of(path: Path, side: int) -> Sheet:
    """Read a preview; damaged ones have no pictures."""
    try:
        stat = path.stat()
        return _sheet_of(path, side, stat.st_mtime_ns, stat.st_size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return Sheet(step_of(path), (), (), (), 0)


@lru_cache(maxsize=4096)
def _sheet_of(path: Path, side: int, *_state: int) -> Sheet:
    with Image.open(path) as opened:
        told = opened.info.get(GRID)
        pixels = opened.convert("RGB")
    grid = grid_of(told, pixels.size)
    if grid is None:
        return Sheet(step_of(path), (), (), ((data_uri(pixels, WHOLE * side),),), 0)
    pictures = tuple(
        tuple(data_uri(picture(pixels, grid, row, column), side) for row in range(len(grid.labels)))
        for column in range(len(grid.columns))
    )
    largest = max(grid.width, grid.height)
    return Sheet(step_of(path), grid.columns, grid.labels, pictures, largest)


def picture(sheet: Image.Image, grid: Grid, row: int, column: int) -> Image.Image:
    """One picture of a sheet, in its own pixels."""
    found = sheet.crop(grid.box(row, column))
    return found.resize((grid.width, grid.height), Image.Resampling.NEAREST)


def data_uri(picture: Image.Image, side: int) -> str:
    """A picture of at most `side` pixels each way, as a URI that holds it."""
    smaller = picture.copy()
    smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    smaller.save(buffer, "WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
