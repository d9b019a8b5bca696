"""Files that are either whole or absent: written under a temporary name, fsynced, renamed.

Everything a cache or a run keeps goes through `publish`, so a crash at any moment leaves the old
file or the new one and at worst a stray in `tmp/`, which the next run sweeps. Behind a URL a file
is uploaded whole instead of renamed: object storage shows nobody a part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import REMEDIES, UserError, first_line
from shared.storage import ownership
from shared.storage.reading import open_regular, read_file, read_if_there
from shared.storage.temporary import sweep, temporary
from shared.storage.typed_json import NewerRecord
from shared.storage.urls import Place

T = TypeVar("T")


class NewerVersion(UserError):
    """A record was written by a newer version of this program."""


JSON_KINDS = {
    list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false",
    type(None): "null",
}  # fmt: skip

# How Python says that a value is not of the shape that a record has.
STUMBLES = (
    KeyError, IndexError, TypeError, AttributeError, AssertionError, OverflowError, RecursionError,
)  # fmt: skip

UNFINISHED = ".distillery-tmp"
READERS, READ_AHEAD = 16, 256  # small files read at a time, and held in memory
COPY_BYTES = 1 << 20


def publish(chunks: Iterable[bytes | memoryview], path: Place, tmp: Path) -> str:
    """Write `chunks` to `path` atomically by way of the folder `tmp` (for a Path on its disk).

    Returns the content's sha256 in hex. Raises UserError when the disk is full or not writable;
    `path` is then as it was.
    """
    with staged(chunks, tmp) as (file, digest):
        move(file, path)
    return digest


@contextmanager
def staged(chunks: Iterable[bytes | memoryview], tmp: Path) -> Iterator[tuple[Path, str]]:
    """Write `chunks` to a fresh, fsynced file in `tmp`; it and its sha256 in hex.

    For content-addressed files, whose name is known only after their bytes. What is not moved away
    is removed in the end.
    """
    digest = hashlib.sha256()
    with guard(tmp), temporary(tmp) as file:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for chunk in chunks:
                digest.update(chunk)
                write_all(fd, chunk)
            os.fsync(fd)
        finally:
            os.close(fd)
        yield file, digest.hexdigest()


@contextmanager
def workshop(tmp: Path, label: str) -> Iterator[Path]:
    """Yield a fresh folder in `tmp` to build something in; what is left in it is removed.

    Raises UserError, of `tmp`'s parent, when the disk is full or not writable.
    """
    with guard(tmp.parent), temporary(tmp, label) as building:
        building.mkdir()
        yield building


def check_free(folder: Path) -> None:
    """Raise UserError for a folder that has something in it already."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is there already; remove it, or choose another --output")


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """Yield a folder beside an output for what is not finished yet.

    It is on the output's disk. What a killed command left there goes, and in the end the folder.
    """
    tmp = output.parent / UNFINISHED
    sweep(tmp)
    try:
        yield tmp
    finally:
        with suppress(OSError):  # never made, or another command works there
            tmp.rmdir()


def move(file: Path, path: Place) -> None:
    """Give a staged file or folder its final name, replacing a file there, durably.

    Raises UserError where the folder has been taken from this process (ownership.py).
    """
    if not isinstance(path, Path):
        path.upload(file)
        return
    with guard(path.parent):
        if path.is_dir() and file.is_file():
            raise UserError(f"{path} is a folder; choose another name for the file")
        path.parent.mkdir(parents=True, exist_ok=True)
        ownership.check(path)
        os.replace(file, path)
        sync_folder(path.parent)


def create_exclusively(content: bytes, path: Place, tmp: Path) -> bool:
    """Publish `content` at `path` unless something is there already; False if it is.

    Of several processes that try at once exactly one wins, and nobody sees a partial file.
    """
    if not isinstance(path, Path):
        return path.create(content)
    with staged([content], tmp) as (file, _), guard(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, path)
        except FileExistsError:
            return False
        sync_folder(path.parent)
    return True


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Call `os.write` until everything is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Place) -> None:
    """Fsync a folder, so that a rename in it survives a power cut; object storage has none."""
    if not isinstance(folder, Path):
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def dump_json(value: Any) -> bytes:
    """Return JSON that is the same for the same value: sorted keys, two spaces, a final newline.

    Names that are not UTF-8 are written as JSON escapes them, and read back as they were.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def parse_json(content: bytes, path: Place, remedy: str = "restore it or build it anew") -> Any:
    """Parse a JSON file. Raises UserError, naming it and the remedy, where it is damaged."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({first_line(error)}); {remedy}") from None


def load_record(path: Place, build: Callable[[Mapping[str, Any]], T], remedy: str) -> T:
    """Build something of a file that holds one JSON object.

    Raises UserError, naming the file and the remedy, where it is missing, damaged or of another
    shape: `build` may stumble over it in any of the ways that Python has for that.
    """
    return parse_record(read_file(path), path, build, remedy)


def parse_record(
    content: bytes, path: Place, build: Callable[[Mapping[str, Any]], T], remedy: str
) -> T:
    """Return the same of a file's content that has been read already."""
    value = parse_json(content, path, remedy)
    if not isinstance(value, dict):
        kind = JSON_KINDS[type(value)]
        raise UserError(f"{path} holds {kind}, not a JSON object; {remedy}")
    try:
        return build(value)
    except NewerRecord as error:
        raise NewerVersion(f"{path} was written by a newer version ({error}): update") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({first_line(error):.200}); {remedy}") from None
    except STUMBLES as error:
        raise UserError(f"{path} is damaged ({error!r:.200}); {remedy}") from None


def read_all(paths: Sequence[Place]) -> Iterator[bytes | None]:
    """Yield the contents of many small files, in their order, several being read at a time.

    None for one that is gone.
    """
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        for start in range(0, len(paths), READ_AHEAD):
            yield from pool.map(read_if_there, paths[start : start + READ_AHEAD])


def file_sizes(folder: Place) -> dict[str, int]:
    """Return name and size of each file in a folder, by name; nothing for no folder."""
    if not isinstance(folder, Path):
        return dict(sorted(folder.file_sizes().items()))
    files = [path for path in sorted(folder.iterdir()) if path.is_file()] if folder.is_dir() else []
    return {path.name: path.stat().st_size for path in files}


def free_bytes(folder: Path) -> int:
    """Free space on the disk where a folder is or would be made."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def file_sha256(path: Place) -> str:
    """Return a file's sha256 in hex. Raises UserError for what is no file or cannot be read."""
    with open_regular(path) if isinstance(path, Path) else path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def copy_durably(source: Place, path: Place, tmp: Path) -> str:
    """Copy a file atomically; returns its sha256 in hex."""
    with source.open("rb") as file:
        return publish(iter(lambda: file.read(COPY_BYTES), b""), path, tmp)


@contextmanager
def guard(folder: Place) -> Iterator[None]:
    """Turn the operating system's refusals into one-line errors that name the folder.

    Other errors of its pass, and name the folder where they name no file.
    """
    try:
        yield
    except OSError as error:
        if error.errno in REMEDIES:
            raise UserError(f"{folder}: {REMEDIES[error.errno]}") from error
        if error.filename is None:
            error.filename = str(folder)
        raise
