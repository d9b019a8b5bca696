"""Rows of Parquet files, and what any table's columns are for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prep.files.litter import HIDDEN, is_litter
from prep.files.remote import RemoteFile, RetryingFile
from prep.files.stream import LocalFile
from prep.rows.character_encoding import UnreadableText, decode_text
from prep.rows.row import (
    CAPTION_KEYS,
    TOO_LARGE,
    Row,
    SourceError,
    as_captions,
    captions_of,
    make_row,
)
from prep.rows.unit import SourceOptions
from prep.sources.tables.cell import cell_of
from prep.sources.tables.column_kinds import MAYBE, OTHER, PICTURE, TEXT, column_kinds, record_of
from prep.sources.tables.linked_pictures import Home, home_of
from shared.errors import UserError

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
# Columns of text that are taken for pictures: paths, base64, data URIs. Of addresses: if allowed.
NAMED_COLUMNS = (*IMAGE_COLUMNS, "file_name", "image_path", "image_file", "path", "image_base64")
URL_COLUMNS = ("url", "URL", "image_url", "img_url", "picture_url")
KEY_COLUMNS = ("__key__", "id", "url", "URL")
BATCH_ROWS = 16  # read at a time
BATCH_BYTES = 32_000_000  # fewer, where their mean in the row group makes this more
BUFFER_BYTES = 1 << 20
SHOWN_NAME = 1000  # characters of a picture's path or address that a row's metadata keeps


@dataclass(frozen=True)
class Columns:
    """Which columns are read for what."""

    image: str
    caption: str | None  # None: the first of CAPTION_KEYS that a row has; `a.b` is b of a struct
    key: str | None
    read: tuple[str, ...]  # all but pictures that nobody asked for
    encoding: str | None = None  # of captions that are bytes, see prep/rows/character_encoding.py

    def row(self, record: Mapping[str, Any], number: int, home: Home, most: int) -> Row:
        """Make a row of a record that holds or names a picture of up to `most` bytes."""
        cell = cell_of(record[self.image])
        data, problem = cell.data, cell.problem
        if cell.name and is_litter(cell.name):
            data, problem = None, HIDDEN
        elif data is None and cell.name and not problem:
            data, problem = home.picture(cell.name, most)
        if data is not None and len(data) > most:
            data, problem = None, TOO_LARGE
        metadata = {name: value for name, value in record.items() if name != self.image}
        if isinstance(record[self.image], str) and cell.name and len(cell.name) <= SHOWN_NAME:
            metadata[self.image] = cell.name
        captions: tuple[str, ...] = ()
        try:
            metadata = self._as_text(metadata)
            wanted = reached(metadata, self.caption) if self.caption else None
            captions = as_captions(wanted) if self.caption else captions_of(metadata)
        except UnreadableText as error:
            problem = problem or f"its caption is {error}"
        key = self._key(metadata, cell.name, number)
        return make_row(key, data, captions, metadata, problem)

    def _as_text(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Without bytes: captions are decoded as a txt is, the rest is left out."""
        texts = (self.caption,) if self.caption else CAPTION_KEYS
        return {
            name: decode_text(value, self.encoding) if isinstance(value, bytes) else value
            for name, value in metadata.items()
            if name in texts or not isinstance(value, bytes)
        }

    def _key(self, metadata: Mapping[str, Any], path: str | None, number: int) -> str:
        if self.key is not None:
            value = metadata.get(self.key)
        else:
            value = path or next((metadata[k] for k in KEY_COLUMNS if metadata.get(k)), None)
        return str(number if value is None else value)

    def state(self) -> dict[str, Any]:
        """Give what of the columns decides the samples."""
        return {"image": self.image, "caption": self.caption, "key": self.key}


def choose_columns(source: str, kinds: Mapping[str, str], options: SourceOptions) -> Columns:
    """As flagged, else by their usual names, else the only one of its kind.

    `kinds` are those of the columns, and of structs' fields as `column.field`. Raises UserError,
    with the columns there are, where none will do.
    """
    columns = [name for name in kinds if "." not in name or name.partition(".")[0] not in kinds]
    there = f"{source} has the columns {', '.join(columns) or 'none at all'}"
    for flag in ("image_column", "caption_column", "key_column"):
        name = getattr(options, flag)
        if name is not None and name not in (kinds if flag == "caption_column" else columns):
            raise UserError(f"--{flag.replace('_', '-')} {name!r}: {there}")
    image = options.image_column or _image_column(kinds, columns, options)
    if image is None or kinds[image] == OTHER:
        raise UserError(f"{there}: {_no_pictures(columns)}")
    captions = [options.caption_column] if options.caption_column else list(CAPTION_KEYS)
    if not any(kinds.get(name) in (TEXT, PICTURE) for name in captions if name != image):
        fields = [name for name in kinds if name not in columns and kinds[name] == TEXT]
        such = f", such as {fields[0]}" if fields else ""
        raise UserError(f"{there}: which one holds the captions? Say --caption-column NAME{such}")
    encoding = options.caption_encoding
    wanted = {image, options.key_column, *captions}
    read = (name for name in columns if kinds[name] != PICTURE or name in wanted)
    return Columns(image, options.caption_column, options.key_column, tuple(read), encoding)


def _image_column(
    kinds: Mapping[str, str], columns: Sequence[str], options: SourceOptions
) -> str | None:
    texts = (*CAPTION_KEYS, options.caption_column)  # which may be bytes, too
    pictures = [name for name in columns if kinds[name] == PICTURE and name not in texts]
    usual = [name for name in IMAGE_COLUMNS if name in pictures]
    if usual or pictures:
        return usual[0] if usual else pictures[0] if len(pictures) == 1 else None
    if likely := [name for name in IMAGE_COLUMNS if kinds.get(name) == MAYBE]:
        return likely[0]
    if _is_account(columns):
        return None
    named = (*NAMED_COLUMNS, *URL_COLUMNS) if options.allow_external_images else NAMED_COLUMNS
    return next((name for name in named if kinds.get(name) == TEXT), None)


def _no_pictures(columns: Sequence[str]) -> str:
    """Say what to do about a table in which no column of pictures is found."""
    if _is_account(columns):
        return (
            "it is img2dataset's account of the tar (or folder) of the same name; pass the tars "
            "alone, such as 'FOLDER/*.tar'"
        )
    if found := next((name for name in columns if name in URL_COLUMNS), None):
        return (
            f"the pictures are elsewhere, at {found!r}; download them with img2dataset and pass "
            "its tars, or fetch them one by one with --allow-external-images"
        )
    return (
        "which one holds the pictures (bytes, or their paths within the folder)? "
        "Say --image-column NAME"
    )


def _is_account(columns: Sequence[str]) -> bool:
    """Did img2dataset write it beside a tar, to say what became of each address?"""
    return {"key", "status", "url"} <= set(columns)


def reached(value: Any, name: str) -> Any:
    """Take the value of `name`, or of `column.field`: in a list of structs, each one's."""
    if isinstance(value, list):
        return [reached(one, name) for one in value]
    if not isinstance(value, Mapping):
        return None
    if name in value:
        return value[name]
    column, dot, field = name.partition(".")
    return reached(value.get(column), field) if dot else None


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
        """Read the rows, row group by row group."""
        home, most = self._home(), self.options.max_image_bytes
        with self._open() as parquet:
            try:
                columns, number = self._columns(parquet), 0
            except UserError as error:  # the others may have them
                raise SourceError(str(error)) from None
            for group in range(parquet.num_row_groups):
                size = _batch_rows(parquet.metadata.row_group(group))
                for batch in parquet.iter_batches(size, [group], list(columns.read)):
                    for one in range(batch.num_rows):
                        yield columns.row(record_of(batch.slice(one, 1)), number, home, most)
                        number += 1

    def sample(self) -> tuple[int, int]:
        """All rows: the file's footer knows their number."""
        with contextlib.suppress(SourceError), self._open() as parquet:
            return parquet.metadata.num_rows, self.size
        return 0, 0

    def _home(self) -> Home:
        """Beside the file, or of its host or bucket."""
        anywhere = self.options.allow_external_images
        if isinstance(self.file, RemoteFile):
            return Home(url=self.file.url, anywhere=anywhere)
        return replace(home_of(self.file.path), anywhere=anywhere)

    def _columns(self, parquet: pq.ParquetFile) -> Columns:
        return choose_columns(self.file.source, column_kinds(parquet.schema_arrow), self.options)

    def _open(self) -> AbstractContextManager[pq.ParquetFile]:
        return open_parquet(self.file)


@contextlib.contextmanager
def open_parquet(file: LocalFile | RemoteFile) -> Iterator[pq.ParquetFile]:
    """Yield the file's tables. Raises SourceError where it is no whole Parquet file."""
    try:
        with RetryingFile(file.url) if isinstance(file, RemoteFile) else file.open() as opened:
            yield pq.ParquetFile(opened, pre_buffer=False, buffer_size=BUFFER_BYTES)
    except (pa.ArrowException, OSError) as error:
        words = " ".join(str(error).split())[:200]
        raise SourceError(
            f"{file.source} is not a whole Parquet file ({words}); download it again"
        ) from None


def _batch_rows(group: pq.RowGroupMetaData) -> int:
    """How many rows of a row group are held at a time."""
    rows, size = int(group.num_rows), int(group.total_byte_size)
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, size)))
