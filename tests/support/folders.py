"""Folders, tars and tables of the same files, and what their rows are."""

import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prep.sources.find import SourceOptions, find_units
from tests.support.sources import Files, write_tar

Found = dict[str, tuple[tuple[str, ...], str]]  # key -> captions, problem


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def tar_of(path: Path, files: dict[str, bytes | str]) -> Path:
    """The same files in the order of their keys, as `tar --sort=name` has them."""

    def content(name: str) -> bytes:
        return files[name].encode() if isinstance(files[name], str) else files[name]  # type: ignore

    names = sorted(files, key=lambda name: (os.path.splitext(name)[0], name))
    members: Files = [(name, content(name)) for name in names]
    return write_tar(path, members)


def table_of(path: Path, pictures: dict[str, bytes]) -> Path:
    """A Parquet file of pictures with their names, each captioned `a`."""
    images = [{"bytes": content, "path": name} for name, content in pictures.items()]
    pq.write_table(pa.table({"image": images, "text": ["a"] * len(images)}), path)
    return path


def rows_of(*sources: object, **options: object) -> Found:
    """Captions and problem of each row by its key; of equal keys the last."""
    units = find_units([str(source) for source in sources], SourceOptions(**options))  # type: ignore
    return {row.key: (row.captions, row.problem) for unit in units for row in unit.rows()}


def written(image: object, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[attr-defined]
    return buffer.getvalue()
