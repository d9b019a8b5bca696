"""Where pictures come from: the one place that turns `--shards` into units of rows.

A tar is a unit. A folder's rows go to `U` units by hash of the file name, so that adding or
removing pictures touches only their units. A unit can be read again and gives the same rows.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prep.braces import expand_braces
from shared.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
CAPTION_KEYS = ("caption", "text", "TEXT", "prompt", "captions")
FOLDER_UNIT_ROWS = 1024


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
        raw = _folder_rows(self) if self.members else _tar_rows(Path(self.source))
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


# --- tars -------------------------------------------------------------------------------------


class SourceError(UserError):
    """A damaged source: its unit cannot be encoded, the others can."""


RawRow = tuple[str, bytes | None, tuple[str, ...], Mapping[str, Any], str]


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


def count_rows(path: Path) -> int:
    """Pictures in a tar, from its headers, as far as it can be read."""
    found = 0
    with contextlib.suppress(SourceError):
        for name, _ in _tar_members(path, contents=False):
            found += _extension(name) in IMAGE_EXTENSIONS
    return found


def _tar_members(path: Path, contents: bool = True) -> Iterator[tuple[str, bytes]]:
    """Name and content of each regular file. Raises UserError where the tar is cut or not a tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            end = 0
            for info in tar:
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if end > path.stat().st_size:
                    raise tarfile.ReadError(f"{info.name} is cut short")
                if info.isfile():
                    file = tar.extractfile(info) if contents else None
                    yield info.name, file.read() if file else b""
    except (tarfile.TarError, EOFError) as error:
        raise SourceError(f"{path} is not a whole tar ({error}); download it again") from None
    # tarfile takes a cut inside a header for the end of the archive; the end mark tells.
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0") or path.stat().st_size % tarfile.BLOCKSIZE:
            raise SourceError(f"{path} is cut short after its last whole file; download it again")


def _tar_rows(path: Path) -> Iterator[RawRow]:
    """Consecutive files that share the name before the first dot make a row, as in webdataset."""
    key, files = "", dict[str, bytes]()
    empty = True
    for name, content in _tar_members(path):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        full = f"{folder}/{stem}" if folder else stem
        if files and (full != key or extension.lower() in files):
            yield _row_from_files(key, files)
            files = {}
        key, empty = full, False
        files[extension.lower()] = content
    if files:
        yield _row_from_files(key, files)
    if empty:
        raise SourceError(f"{path} holds no files; download it again or leave it out of --shards")


def _row_from_files(key: str, files: Mapping[str, bytes]) -> RawRow:
    image = next((files[ext] for ext in IMAGE_EXTENSIONS if ext in files), None)
    metadata: Mapping[str, Any] = {}
    if "json" in files:
        try:
            loaded = json.loads(files["json"])
            metadata = loaded if isinstance(loaded, dict) else {}
        except ValueError:
            metadata = {}  # the picture and its txt may still be good
    if "txt" in files:
        captions: tuple[str, ...] = (files["txt"].decode("utf-8", "replace").strip(),)
    else:
        captions = _captions(metadata)
    return _checked(key, image, captions, metadata)


# --- folders ----------------------------------------------------------------------------------


def _folder(path: Path, folder_units: int | None) -> list[Unit]:
    rows = _folder_metadata(path)
    if not rows:
        raise UserError(f"{path}: its metadata lists no pictures")
    wanted = folder_units or _power_of_two(len(rows) / FOLDER_UNIT_ROWS)
    if wanted < 1 or wanted & (wanted - 1):
        raise UserError(f"--folder-units {wanted} is not a power of two")
    parts: list[list[dict[str, Any]]] = [[] for _ in range(wanted)]
    for row in rows:
        digest = hashlib.sha256(row["file_name"].encode()).digest()
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
        for number, line in enumerate((path / "metadata.jsonl").read_text("utf-8").splitlines(), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise UserError(f"{path}/metadata.jsonl line {number}: {error}") from None
    elif (path / "metadata.csv").is_file():
        with (path / "metadata.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
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
    return sorted(rows, key=lambda row: row["file_name"])


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
        path = (folder / row["file_name"]).resolve()
        captions = _captions(row)
        if not path.is_relative_to(folder):
            yield row["file_name"], None, captions, row, "outside the folder"
            continue
        try:
            image = path.read_bytes()
        except (OSError, ValueError):
            yield row["file_name"], None, captions, row, "file missing"
            continue
        yield _checked(row["file_name"], image, captions, row)


# --- both -------------------------------------------------------------------------------------


def _checked(
    key: str, image: bytes | None, captions: tuple[str, ...], metadata: Mapping[str, Any]
) -> RawRow:
    problem = ""
    if image is None:
        problem = "no picture"
    elif not captions:
        problem = "no caption"
    return key, image, captions, metadata, problem


def _captions(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    for name in CAPTION_KEYS:
        value = metadata.get(name)
        if isinstance(value, str) and value.strip():
            return (value.strip(),)
        if isinstance(value, list):
            return tuple(text.strip() for text in value if isinstance(text, str) and text.strip())
    return ()


def _extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _power_of_two(at_least: float) -> int:
    power = 1
    while power < at_least:
        power *= 2
    return power
