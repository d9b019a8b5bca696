"""Rows of a folder of pictures with metadata.jsonl, metadata.csv or a NAME.txt beside each.

Rows go to `U` units by hash of the file name, so that adding or removing pictures touches only
their units.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.images.kinds import HEAD_BYTES, no_picture_in
from prep.rows.row import (
    CAPTION_KEYS,
    IMAGE_EXTENSIONS,
    LARGE_JSON,
    METADATA_EXTENSION,
    TEXT_BYTES,
    TOO_LARGE,
    Row,
    captions_of,
    make_row,
    record_in,
)
from prep.rows.unit import Reader, SourceOptions, Unit, count_units, given_flags, unit_name
from prep.sources.folders.listing import MISSING, Member
from prep.sources.folders.metadata import EXAMPLE, FILE_NAME, LISTS
from prep.sources.folders.tree import walk
from shared.errors import UserError
from shared.sanitize import printable

READ = (*IMAGE_EXTENSIONS, METADATA_EXTENSION)  # without a look at what it is
KOHYA = re.compile(r"([1-9]\d{0,2})_.+")  # a folder's name: how often its pictures come in an epoch


@dataclass(frozen=True)
class FolderReader(Reader):
    """Reads the pictures of some rows of a folder."""

    folder: str
    members: tuple[Member, ...]
    options: SourceOptions

    def rows(self) -> Iterator[Row]:
        """Read a row for each member, whether or not its picture is there."""
        for member in self.members:
            image, problem = None, member.problem
            if not problem:
                image, problem = self._content(member.path, self.options.max_image_bytes, TOO_LARGE)
            record, unread = self._record(member.json) if member.json else ({}, "")
            column = self.options.caption_column
            captions = captions_of(member.row, column) or captions_of(record, column)
            if image is not None and not captions:
                problem = problem or unread
            said = _typed(member.row) if member.text_only else member.row
            yield make_row(member.name, image, captions, {**record, **said}, problem)

    def _record(self, path: str) -> tuple[Mapping[str, Any], str]:
        """Read the NAME.json beside a picture, or say why it cannot be read."""
        content, problem = self._content(path, TEXT_BYTES, LARGE_JSON)
        if content is None:
            return {}, problem
        return record_in(content, self.options.caption_encoding)

    def _content(self, path: str, most: int, too_large: str) -> tuple[bytes | None, str]:
        """Read a file of the folder, or say why it is not read."""
        try:
            if not path or not (file := Path(self.folder, path)).is_file():
                return None, MISSING  # reading a pipe would wait for ever
            if file.suffix[1:].lower() not in READ:
                with file.open("rb") as opened:
                    if problem := no_picture_in(opened.read(HEAD_BYTES)):
                        return None, problem
            return (None, too_large) if file.stat().st_size > most else (file.read_bytes(), "")
        except PermissionError:
            return None, "file may not be read"
        except (OSError, ValueError, RuntimeError):  # the last is a loop of links
            return None, MISSING


def folder_units(path: Path, members: Sequence[Member], options: SourceOptions) -> list[Unit]:
    """Cut a folder into units. Raises UserError where no row can have a caption."""
    _refuse_uncaptioned(path, members, options)
    wanted = count_units(options, len(members))
    parts: list[list[Member]] = [[] for _ in range(wanted)]
    for member in members:
        digest = hashlib.sha256(member.name.encode("utf-8", "surrogatepass")).digest()
        parts[int.from_bytes(digest[:4], "big") % wanted].append(member)
    return [
        Unit(
            name=unit_name(f"{path.name}-{number}of{wanted}", str(path)),
            source=printable(str(path)),
            state=_state(path, part) | given_flags(options),
            reader=FolderReader(str(path), tuple(part), options),
            rows_known=len(part),
        )
        for number, part in enumerate(parts)
        if part
    ]


def _refuse_uncaptioned(path: Path, members: Sequence[Member], options: SourceOptions) -> None:
    shown, column = printable(str(path)), options.caption_column
    if not members:
        if empty := next((name for name in LISTS if (path / name).is_file()), ""):
            raise UserError(f"{shown}/{empty} names no pictures; write lines such as {EXAMPLE}")
        raise UserError(
            f"{shown} has no pictures, nor metadata.jsonl with lines such as {EXAMPLE}; is it the "
            "right folder?"
        )
    keys = dict.fromkeys(str(key) for member in members for key in member.row)
    if any((member.json or member.problem) and not member.listed for member in members):
        return  # which may have them, or say why they have none
    if column and column not in keys:
        raise UserError(f"--caption-column {column!r}: {shown} has the columns {', '.join(keys)}")
    if column or not keys.keys().isdisjoint(CAPTION_KEYS):
        return
    if any(member.listed for member in members):
        raise UserError(
            f"{shown}: its metadata has the columns {', '.join(keys)}: which one holds the "
            "captions? Say --caption-column NAME"
        )
    count = len(members)
    none = "its picture has no" if count == 1 else f"none of its {count} pictures has a"
    raise UserError(
        f"{shown}: {none} caption, such as NAME.txt beside NAME.jpg, or a line of "
        f"metadata.jsonl: {EXAMPLE}{_likely_list(path)}"
    )


def _likely_list(path: Path) -> str:
    """Note a list of pictures that has another name, or nothing."""
    endings = (".jsonl", ".csv", ".tsv", ".json")
    likely = [name for name in next(walk(path)).names if name.lower().endswith(endings)]
    if len(likely) != 1:
        return ""
    name = f"metadata{os.path.splitext(likely[0])[1].lower()}"
    return f"; if {printable(likely[0])} holds the captions, name it {name}"


def repeats_in(units: Sequence[Unit]) -> str:
    """Note folders named in kohya's way, whose repeats are not applied; or nothing."""
    named: dict[str, None] = {}
    for unit in units:
        if isinstance(unit.reader, FolderReader):
            folder = Path(unit.reader.folder)
            for member in unit.reader.members:
                place = Path(member.path).parts[:-1]
                named.update(dict.fromkeys((folder.resolve().name, *place)))
    found = sorted(name for name in named if (said := KOHYA.fullmatch(name)) and int(said[1]) > 1)
    if not found:
        return ""
    return (
        f"{printable(found[0])}: the repeats in a folder's name, as kohya reads it, are not "
        "applied; each picture is one sample"
    )


def _state(path: Path, members: Sequence[Member]) -> dict[str, Any]:
    """Hash the rows and each picture's size and modification time."""
    digest = hashlib.sha256()
    for member in members:
        digest.update(json.dumps(member.row, sort_keys=True).encode())
        for name in filter(None, (member.path, member.json)):
            digest.update(_version(path / name))
        digest.update(member.problem.encode() if member.path else b"missing")
    return {"sha256": digest.hexdigest()}


def _version(path: Path) -> bytes:
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return b"missing"
    return f"{stat.st_size} {stat.st_mtime_ns}".encode()


def _typed(member: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as numbers and empty cells left out, so that `--where` can compare them."""
    return {
        name: value if name in (FILE_NAME, *CAPTION_KEYS) else _number(value)
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
