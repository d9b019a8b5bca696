"""Rows of a WebDataset tar, read strictly: a cut is an error, never the end."""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prep.rows import IMAGE_EXTENSIONS, RawRow, SourceError, captions_of, checked_row


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
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise SourceError(f"{path} is cut short after its last whole file; download it again")


def tar_rows(path: Path) -> Iterator[RawRow]:
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
        except (ValueError, RecursionError):
            metadata = {}  # the picture and its txt may still be good
    text = files.get("txt", b"").decode("utf-8", "replace").strip()
    captions = (text,) if text else captions_of(metadata)
    return checked_row(key, image, captions, metadata)


def _extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()
