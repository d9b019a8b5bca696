"""Rows of a folder of pictures with metadata.jsonl, metadata.csv or a NAME.txt beside each.

Rows go to `U` units by hash of the file name, so that adding or removing pictures touches only
their units.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.rows import (
    CAPTION_KEYS,
    IMAGE_EXTENSIONS,
    MAX_CAPTION,
    TOO_LARGE,
    Row,
    as_captions,
    captions_of,
    make_row,
)
from prep.units import UNIT_ROWS, SourceOptions, Unit, power_of_two, printable, unit_name
from shared.errors import UserError


@dataclass(frozen=True)
class FolderReader:
    """Reads the pictures that some rows of the metadata name."""

    folder: str
    members: tuple[dict[str, Any], ...]
    max_image_bytes: int
    text_only: bool  # from a CSV, which has no numbers
    caption_column: str | None  # None: the first of CAPTION_KEYS that a row has

    def rows(self) -> Iterator[Row]:
        """A row for each member, whether or not its picture is there."""
        folder = Path(self.folder).resolve()
        for member in self.members:
            name, column = member["file_name"], self.caption_column
            captions = as_captions(member.get(column)) if column else captions_of(member)
            metadata = _typed(member) if self.text_only else member
            image, problem = None, ""
            try:
                path = (folder / name).resolve()
                if not path.is_relative_to(folder):
                    problem = "outside the folder"
                elif not path.is_file():  # reading a pipe would wait for ever
                    problem = "file missing"
                elif path.stat().st_size > self.max_image_bytes:
                    problem = TOO_LARGE
                else:
                    image = path.read_bytes()
            except (OSError, ValueError, RuntimeError):  # the last is a loop of links
                problem = "file missing"
            yield make_row(name, image, captions, metadata, problem)

    def sample(self) -> tuple[int, int]:
        """Never asked: the rows are known."""
        return len(self.members), 0


def folder_units(path: Path, options: SourceOptions) -> list[Unit]:
    """The units of a folder. Raises UserError where it has no usable metadata."""
    rows = _metadata(path)
    if not rows:
        raise UserError(f"{path}: its metadata lists no pictures")
    column = options.caption_column
    if column and not any(column in row for row in rows):
        raise UserError(f"--caption-column {column!r}: {path} has the columns {', '.join(rows[0])}")
    wanted = options.folder_units or power_of_two(len(rows) / UNIT_ROWS)
    if wanted < 1 or wanted & (wanted - 1):
        raise UserError(f"--folder-units {wanted} is not a power of two")
    text_only = not (path / "metadata.jsonl").is_file()
    parts: list[list[dict[str, Any]]] = [[] for _ in range(wanted)]
    for row in rows:
        digest = hashlib.sha256(row["file_name"].encode("utf-8", "surrogatepass")).digest()
        parts[int.from_bytes(digest[:4], "big") % wanted].append(row)
    return [
        Unit(
            name=unit_name(f"{path.name}-{number}of{wanted}", str(path)),
            source=printable(str(path)),
            state=_state(path, part) | ({"caption_column": column} if column else {}),
            reader=FolderReader(str(path), tuple(part), options.max_image_bytes, text_only, column),
            rows_known=len(part),
        )
        for number, part in enumerate(parts)
        if part
    ]


def _metadata(path: Path) -> list[dict[str, Any]]:
    """`file_name` and captions per picture, sorted by name."""
    if (path / "metadata.jsonl").is_file():
        rows = list(_json_lines(path / "metadata.jsonl"))
    elif (path / "metadata.csv").is_file():
        try:
            rows = list(csv.DictReader(io.StringIO(_utf8(path / "metadata.csv"))))
        except csv.Error as error:
            raise UserError(f"{path}/metadata.csv: {error}; use metadata.jsonl instead") from None
    else:
        rows = _captions_beside(path)
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


def _json_lines(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_utf8(path).split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path} line {number}: {error}") from None
            except RecursionError:
                raise UserError(f"{path} line {number} is nested too deeply") from None


def _captions_beside(path: Path) -> list[dict[str, Any]]:
    """A row for each picture, also for one without a caption; none where no picture has one."""
    rows, captioned = [], False
    for image in sorted(path.rglob("*")):
        if image.suffix[1:].lower() in IMAGE_EXTENSIONS:
            row = {"file_name": str(image.relative_to(path))}
            if (text := image.with_suffix(".txt")).is_file():
                row["text"] = _caption_in(text)
                captioned = True
            rows.append(row)
    return rows if captioned else []


def _caption_in(path: Path) -> str:
    """The text of a file; of one that is too large as much as shows that it is."""
    with path.open("rb") as file:
        return file.read(4 * (MAX_CAPTION + 1)).decode("utf-8-sig", "replace").strip()


def _utf8(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _state(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def _typed(member: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as numbers and empty cells left out, so that `--where` can compare them."""
    return {
        name: value if name in ("file_name", *CAPTION_KEYS) else _number(value)
        for name, value in member.items()
        if value
    }


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
