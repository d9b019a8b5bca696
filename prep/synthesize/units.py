"""Captions go to units of work by hash of their text.

So a changed file of captions touches only the units of those that changed, and rows of the same
caption are in one unit, where they are told apart by number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prep.rows.row import Row
from prep.rows.unit import Reader, SourceOptions, Unit, count_units, unit_name
from prep.synthesize.caption_files import CaptionFile, CaptionRow


@dataclass(frozen=True)
class CaptionReader(Reader):
    """Hands out each caption as often as it is to be drawn."""

    captions: tuple[CaptionRow, ...]
    per_caption: int

    def rows(self) -> Iterator[Row]:
        """Rows without pictures; a row that has no caption comes once, with its problem."""
        for one in self.captions:
            row = Row(one.key, 0, None, (one.caption,) if one.caption else (), {}, one.problem)
            yield from [row] * (1 if one.problem else self.per_caption)

    @property
    def count(self) -> int:
        """Rows in all."""
        return sum(1 if one.problem else self.per_caption for one in self.captions)


def caption_units(files: Sequence[CaptionFile], per_caption: int, wanted: int | None) -> list[Unit]:
    """Cut files of captions into units, sorted by name; `wanted` is their number for each file.

    Raises UserError unless that is a power of two.
    """
    units = [unit for one in files for unit in _units(one, per_caption, wanted)]
    return sorted(units, key=lambda unit: unit.name)


def _units(file: CaptionFile, per_caption: int, wanted: int | None) -> Iterator[Unit]:
    options = SourceOptions(folder_units=wanted)
    count = count_units(options, CaptionReader(file.rows, per_caption).count)
    parts: list[list[CaptionRow]] = [[] for _ in range(count)]
    for row in file.rows:
        digest = hashlib.sha256(row.caption.encode("utf-8", "surrogatepass")).digest()
        parts[int.from_bytes(digest[:4], "big") % count].append(row)
    for number, part in enumerate(parts):
        if part:
            reader = CaptionReader(tuple(part), per_caption)
            yield Unit(
                name=unit_name(f"{file.name}-{number}of{count}", file.source),
                source=file.source,
                state={"sha256": _digest(part)},
                reader=reader,
                rows_known=reader.count,
            )


def _digest(rows: Sequence[CaptionRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.key, row.caption, row.problem]).encode())
    return digest.hexdigest()
