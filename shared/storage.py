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
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from shared.errors import REMEDIES, UserError, first_line, unreadable
from shared.places import Place
from shared.records import NewerRecord
from shared.temporary import temporary

T = TypeVar("T")

JSON_KINDS = {
    list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false",
    type(None): "null",
}  # fmt: skip

# How Python says that a value is not of the shape that a record has.
STUMBLES = (
    KeyError, IndexError, TypeError, AttributeError, AssertionError, OverflowError, RecursionError,
)  # fmt: skip

READERS, READ_AHEAD = 16, 256  # small files read at a time, and held in memory
COPY_BYTES = 1 << 20


def publish(chunks: Iterable[bytes], path: Place, tmp: Path) -> str:
    """Write `chunks` to `path` atomically by way of the folder `tmp` (for a Path on its disk).

    Returns the content's sha256 in hex. Raises UserError when the disk is full or not writable;
    `path` is then as it was.
    """
    staged, digest = stage(chunks, tmp)
    move(staged, path)
    return digest


def stage(chunks: Iterable[bytes | memoryview], tmp: Path) -> tuple[Path, str]:
    """Write `chunks` to a fresh, fsynced file in `tmp`; returns it with its sha256 in hex.

    For content-addressed files, whose name is known only after their bytes.
    """
    with guard(tmp):
        tmp.mkdir(parents=True, exist_ok=True)
    staged = temporary(tmp)
    digest = hashlib.sha256()
    with guard(tmp):
        fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for chunk in chunks:
                digest.update(chunk)
                write_all(fd, chunk)
            os.fsync(fd)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
    return staged, digest.hexdigest()


def move(staged: Path, path: Place) -> None:
    """Give a staged file its final name, replacing what stood there, durably."""
    if not isinstance(path, Path):
        try:
            path.upload(staged)
        finally:
            staged.unlink(missing_ok=True)
        return
    try:
        with guard(path.parent):
            if path.is_dir() and staged.is_file():
                raise UserError(f"{path} is a folder; choose another name for the file")
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, path)
            sync_folder(path.parent)
    except UserError:
        if staged.is_file():
            staged.unlink()
        raise


def create_exclusively(content: bytes, path: Place, tmp: Path) -> bool:
    """Publish `content` at `path` unless something is there already; False if it is.

    Of several processes that try at once exactly one wins, and nobody sees a partial file.
    """
    if not isinstance(path, Path):
        return path.create(content)
    staged, _ = stage([content], tmp)
    try:
        with guard(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(staged, path)
            sync_folder(path.parent)
    except FileExistsError:
        return False
    finally:
        staged.unlink(missing_ok=True)
    return True


def write_all(fd: int, data: bytes | memoryview) -> None:
    """`os.write` until everything is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Place) -> None:
    """fsync a folder, so that a rename in it survives a power cut; object storage has none."""
    if not isinstance(folder, Path):
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """fsync a folder and all that a library wrote into it, before a rename makes it visible."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_folder(path)  # a file is opened and synced in the same way
    sync_folder(folder)


def dump_json(value: Any) -> bytes:
    """JSON that is the same for the same value: sorted keys, two spaces, a final newline.

    Names that are not UTF-8 are written as JSON escapes them, and read back as they were.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def load_json(path: Place) -> Any:
    """Parse a JSON file. Raises UserError, naming the file, where it is missing or damaged."""
    return parse_json(read_file(path), path)


def read_file(path: Place) -> bytes:
    """A file's content. Raises UserError, naming it, where it is missing or cannot be read."""
    content = read_if_there(path)
    if content is None:
        raise UserError(f"{path} does not exist")
    return content


def read_if_there(path: Place) -> bytes | None:
    """A file's content, or None where there is none.

    Raises UserError for what is no file (a pipe would be waited for), or may not be read.
    """
    try:
        if not isinstance(path, Path):
            return path.read_bytes()
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A local file's bytes. Raises UserError for what is no file or may not be read.

    FileNotFoundError where there is nothing.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # which waits for no pipe
        with os.fdopen(fd, "rb") as file:
            kind = os.fstat(fd).st_mode
            if not stat.S_ISREG(kind):
                raise UserError(
                    f"{path} is {kind_of(kind)}, where a file is expected; move it away"
                )
            yield file
    except FileNotFoundError:
        raise
    except IsADirectoryError:  # Python does not open a folder's descriptor
        raise UserError(f"{path} is a folder, no file; move it away") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read {unreadable(error)}") from None


def kind_of(mode: int) -> str:
    """What `st_mode` says that something is, which is no file."""
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a named pipe" if stat.S_ISFIFO(mode) else "a device or socket"


def parse_json(content: bytes, path: Place) -> Any:
    """What a JSON file holds. Raises UserError, naming it, where it is damaged."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({first_line(error)}); restore it or build it anew"
        ) from None


def load_record(path: Place, build: Callable[[Mapping[str, Any]], T], remedy: str) -> T:
    """What `build` makes of a file that holds one JSON object.

    Raises UserError, naming the file and the remedy, where it is missing, damaged or of another
    shape: `build` may stumble over it in any of the ways that Python has for that.
    """
    return parse_record(read_file(path), path, build, remedy)


def parse_record(
    content: bytes, path: Place, build: Callable[[Mapping[str, Any]], T], remedy: str
) -> T:
    """The same of a file's content that has been read already."""
    value = parse_json(content, path)
    if not isinstance(value, dict):
        kind = JSON_KINDS[type(value)]
        raise UserError(f"{path} holds {kind}, not a JSON object; {remedy}")
    try:
        return build(value)
    except NewerRecord as error:
        raise UserError(f"{path} was written by a newer version ({error}): update") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({first_line(error):.200}); {remedy}") from None
    except STUMBLES as error:
        raise UserError(f"{path} is damaged ({error!r:.200}); {remedy}") from None


def read_all(paths: Sequence[Place]) -> Iterator[bytes | None]:
    """The contents of many small files, in their order, several being read at a time.

    None for one that is gone.
    """
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        for start in range(0, len(paths), READ_AHEAD):
            yield from pool.map(read_if_there, paths[start : start + READ_AHEAD])


def file_sizes(folder: Place) -> dict[str, int]:
    """Name and size of each file in a folder, by name; nothing where there is no folder."""
    if not isinstance(folder, Path):
        return dict(sorted(folder.file_sizes().items()))
    files = [path for path in sorted(folder.iterdir()) if path.is_file()] if folder.is_dir() else []
    return {path.name: path.stat().st_size for path in files}


def free_bytes(folder: Path) -> int:
    """Free space on the disk where a folder is or would be made."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def file_sha256(path: Place) -> str:
    """sha256 of a file's bytes, in hex. Raises UserError for what is no file or cannot be read."""
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
