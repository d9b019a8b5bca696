"""Rows of Parquet files, and what any table's columns are for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from prep.remote import RemoteFile, RetryingFile
from prep.rows import CAPTION_KEYS, TOO_LARGE, Row, SourceError, as_captions, captions_of, make_row
from prep.streams import LocalFile
from prep.units import SourceOptions
from shared.errors import UserError

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
KEY_COLUMNS = ("__key__", "id", "url", "URL")
BATCH_ROWS = 16  # read at a time
BATCH_BYTES = 32_000_000  # fewer, where their mean in the row group makes this more
BUFFER_BYTES = 1 << 20

PICTURE, TEXT, OTHER = "picture", "text", "other"  # what a column may hold


@dataclass(frozen=True)
class Columns:
    """Which columns are read for what."""

    image: str
    caption: str | None  # None: the first of CAPTION_KEYS that a row has
    key: str | None
    read: tuple[str, ...]  # all but binary ones that nobody asked for

    def row(self, record: Mapping[str, Any], number: int, max_image_bytes: int) -> Row:
        """A record, whose picture is bytes or a struct of `bytes` and `path`."""
        picture = record[self.image]
        path = None
        if isinstance(picture, dict):
            picture, path = picture.get("bytes"), picture.get("path")
        metadata = {name: value for name, value in record.items() if name != self.image}
        if self.caption is None:
            captions = captions_of(metadata)
        else:
            captions = as_captions(metadata[self.caption])
        problem = ""
        if picture is not None and len(picture) > max_image_bytes:
            picture, problem = None, TOO_LARGE
        return make_row(self._key(metadata, path, number), picture, captions, metadata, problem)

    def _key(self, metadata: Mapping[str, Any], path: str | None, number: int) -> str:
        if self.key is not None:
            value = metadata[self.key]
        else:
            value = path or next((metadata[k] for k in KEY_COLUMNS if metadata.get(k)), None)
        return str(number if value is None else value)

    def state(self) -> dict[str, Any]:
        """What of the columns decides the samples."""
        return {"image": self.image, "caption": self.caption, "key": self.key}


def choose_columns(source: str, kinds: Mapping[str, str], options: SourceOptions) -> Columns:
    """As flagged, else by their usual names, else the only one of its kind.

    Raises UserError, with the columns there are, where none will do.
    """
    there = f"{source} has the columns {', '.join(kinds) or 'none at all'}"
    for flag in ("image_column", "caption_column", "key_column"):
        name = getattr(options, flag)
        if name is not None and name not in kinds:
            raise UserError(f"--{flag.replace('_', '-')} {name!r}: {there}")
    pictures = [name for name, kind in kinds.items() if kind == PICTURE]
    usual = [name for name in IMAGE_COLUMNS if name in pictures]
    image = options.image_column or next(iter(usual), pictures[0] if len(pictures) == 1 else None)
    if image is None or kinds[image] != PICTURE:
        raise UserError(f"{there}: which one holds the pictures' bytes? Say --image-column NAME")
    texts = [name for name, kind in kinds.items() if kind == TEXT]
    if options.caption_column is None and not set(texts) & set(CAPTION_KEYS):
        raise UserError(f"{there}: which one holds the captions? Say --caption-column NAME")
    read = (name for name, kind in kinds.items() if kind != PICTURE or name == image)
    return Columns(image, options.caption_column, options.key_column, tuple(read))


def arrow_kind(kind: pa.DataType) -> str:
    """What a column of this Arrow type may hold."""
    if pa.types.is_dictionary(kind):
        return arrow_kind(kind.value_type)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return PICTURE
    if pa.types.is_struct(kind):
        inner = {field.name: field.type for field in kind}
        return PICTURE if "bytes" in inner and arrow_kind(inner["bytes"]) == PICTURE else OTHER
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return TEXT if arrow_kind(kind.value_type) == TEXT else OTHER
    return TEXT if pa.types.is_string(kind) or pa.types.is_large_string(kind) else OTHER


@dataclass(frozen=True)
class ParquetReader:
    """Reads a Parquet file a few rows at a time."""

    file: LocalFile | RemoteFile
    size: int
    options: SourceOptions

    def columns(self) -> Columns:
        """Which columns are used. Raises UserError where they cannot be told."""
        with self._open() as parquet:
            return self._columns(parquet)

    def rows(self) -> Iterator[Row]:
        """The rows, row group by row group."""
        with self._open() as parquet:
            try:
                columns, number = self._columns(parquet), 0
            except UserError as error:  # the others may have them
                raise SourceError(str(error)) from None
            for group in range(parquet.num_row_groups):
                size = _batch_rows(parquet.metadata.row_group(group))
                for batch in parquet.iter_batches(size, [group], list(columns.read)):
                    for one in range(batch.num_rows):
                        (record,) = batch.slice(one, 1).to_pylist()
                        yield columns.row(record, number, self.options.max_image_bytes)
                        number += 1

    def sample(self) -> tuple[int, int]:
        """All rows: the file's footer knows their number."""
        with contextlib.suppress(SourceError), self._open() as parquet:
            return parquet.metadata.num_rows, self.size
        return 0, 0

    def _columns(self, parquet: pq.ParquetFile) -> Columns:
        kinds = {field.name: arrow_kind(field.type) for field in parquet.schema_arrow}
        return choose_columns(self.file.source, kinds, self.options)

    @contextlib.contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        try:
            with self._bytes() as file:
                yield pq.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)
        except (pa.ArrowException, OSError) as error:
            words = " ".join(str(error).split())[:200]
            raise SourceError(
                f"{self.file.source} is not a whole Parquet file ({words}); download it again"
            ) from None

    def _bytes(self) -> AbstractContextManager[BinaryIO | RetryingFile]:
        return (
            RetryingFile(self.file.url) if isinstance(self.file, RemoteFile) else self.file.open()
        )


def _batch_rows(group: pq.RowGroupMetaData) -> int:
    """How many rows of a row group are held at a time."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
