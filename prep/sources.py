"""Where pictures come from: the one place that turns `--shards` into units of rows.

A tar is a unit. A folder's rows go to `U` units by hash of the file name, so that adding or
removing pictures touches only their units. A unit can be read again and gives the same rows.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prep.braces import expand_braces
from prep.rows import IMAGE_EXTENSIONS, RawRow, SourceError, captions_of, checked_row
from prep.tars import count_rows, tar_rows
from shared.errors import UserError

FOLDER_UNIT_ROWS = 1024

__all__ = ["Row", "SourceError", "Unit", "count_rows", "find_units", "unit_name"]


@dataclass(frozen=True)
class Row:
    """One input row: a picture's bytes and what is said about it."""

    key: str
    occurrence: int  # 0 for the first row of this key in its unit, then 1, ...
    image: bytes | None  # None where the row has no picture
    captions: tuple[str, ...]
    metadata: Mapping[str, Any]
    problem: str = ""  # why the row cannot be used, found while reading


@dataclass(frozen=True)
class Unit:
    """A piece of work that commits as a whole."""

    name: str  # of its commit record
    source: str  # the tar's or folder's path, as typed
    state: Mapping[str, Any]  # changes when the source does
    rows_estimate: int
    members: tuple[dict[str, Any], ...] = field(default=(), repr=False)  # a folder's metadata rows

    def rows(self) -> Iterator[Row]:
        """The rows in source order. Raises UserError where the source is damaged."""
        raw = _folder_rows(self) if self.members else tar_rows(Path(self.source))
        seen: dict[str, int] = {}
        for key, image, captions, metadata, problem in raw:
            seen[key] = occurrence = seen.get(key, -1) + 1
            yield Row(key, occurrence, image, captions, metadata, problem)


def find_units(shards: Sequence[str], folder_units: int | None) -> list[Unit]:
    """The units that `--shards` names, sorted by name.

    Raises UserError where a pattern matches nothing, naming the nearest thing that exists.
    """
    units: dict[str, Unit] = {}
    for pattern in shards:
        for path in _match(pattern):
            found = _folder(path, folder_units) if path.is_dir() else [_tar(path)]
            units.update({unit.name: unit for unit in found})
    return [units[name] for name in sorted(units)]


def _match(pattern: str) -> list[Path]:
    paths: list[Path] = []
    for one in expand_braces(pattern):
        found = sorted(glob.glob(one)) if glob.has_magic(one) else [one]
        if not found or not os.path.exists(found[0]):
            parent = Path(one).parent
            hint = f"{parent} has no such file" if parent.is_dir() else f"{parent} does not exist"
            raise UserError(f"--shards: nothing matches {one!r} ({hint})")
        paths += [Path(os.path.normpath(path)) for path in found]
    return paths


def unit_name(basename: str, source: str) -> str:
    """A file name that is readable and unique: basename and 8 hex digits of the full source."""
    return f"{basename}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def _tar(path: Path) -> Unit:
    if not path.is_file() or path.stat().st_size == 0:
        raise UserError(f"{path} is empty; download it again or leave it out of --shards")
    stat = path.stat()
    return Unit(
        name=unit_name(path.name.removesuffix(".tar"), str(path)),
        source=str(path),
        state={"size": stat.st_size, "mtime_ns": stat.st_mtime_ns},
        rows_estimate=0,
    )


def _folder(path: Path, folder_units: int | None) -> list[Unit]:
    rows = _folder_metadata(path)
    if not rows:
        raise UserError(f"{path}: its metadata lists no pictures")
    wanted = folder_units or _power_of_two(len(rows) / FOLDER_UNIT_ROWS)
    if wanted < 1 or wanted & (wanted - 1):
        raise UserError(f"--folder-units {wanted} is not a power of two")
    parts: list[list[dict[str, Any]]] = [[] for _ in range(wanted)]
    for row in rows:
        digest = hashlib.sha256(row["file_name"].encode("utf-8", "surrogatepass")).digest()
        parts[int.from_bytes(digest[:4], "big") % wanted].append(row)
    return [
        Unit(
            name=unit_name(f"{path.name}-{number}of{wanted}", str(path)),
            source=str(path),
            state=_folder_state(path, part),
            rows_estimate=len(part),
            members=tuple(part),
        )
        for number, part in enumerate(parts)
        if part
    ]


def _folder_metadata(path: Path) -> list[dict[str, Any]]:
    """`file_name` and captions per picture: metadata.jsonl, metadata.csv, or NAME.txt beside it."""
    if (path / "metadata.jsonl").is_file():
        rows = []
        for number, line in enumerate(_utf8(path / "metadata.jsonl").split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise UserError(f"{path}/metadata.jsonl line {number}: {error}") from None
    elif (path / "metadata.csv").is_file():
        rows = list(csv.DictReader(io.StringIO(_utf8(path / "metadata.csv"))))
    else:
        rows = [
            {"file_name": str(text.with_suffix(image.suffix).relative_to(path)),
             "text": text.read_text("utf-8", "replace").strip()}
            for image in sorted(path.rglob("*"))
            if image.suffix[1:].lower() in IMAGE_EXTENSIONS
            and (text := image.with_suffix(".txt")).is_file()
        ]  # fmt: skip
        if not rows:
            raise UserError(
                f"{path} has neither metadata.jsonl nor metadata.csv nor captions in NAME.txt; "
                'a line of metadata.jsonl is {"file_name": "a.jpg", "text": "a caption"}'
            )
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError(f"{path}: row {number} of the metadata has no file_name")
        if None in row:  # more cells than headings: a comma outside quotes
            raise UserError(f"{path}/metadata.csv: row {number} has more cells than the heading")
    return sorted(rows, key=lambda row: row["file_name"])


def _utf8(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _folder_state(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A hash over the rows and each picture's size and modification time."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
        try:
            stat = (path / row["file_name"]).stat()
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        except (OSError, ValueError):
            digest.update(b"missing")
    return {"sha256": digest.hexdigest()}


def _folder_rows(unit: Unit) -> Iterator[RawRow]:
    folder = Path(unit.source).resolve()
    for row in unit.members:
        captions = captions_of(row)
        try:
            path = (folder / row["file_name"]).resolve()
            if not path.is_relative_to(folder):
                yield row["file_name"], None, captions, row, "outside the folder"
                continue
            image = path.read_bytes()
        except (OSError, ValueError, RuntimeError):  # the last is a loop of links
            yield row["file_name"], None, captions, row, "file missing"
            continue
        yield checked_row(row["file_name"], image, captions, row)


def _power_of_two(at_least: float) -> int:
    power = 1
    while power < at_least:
        power *= 2
    return power
