"""Rows of Parquet files, and what any table's columns are for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from prep.held import cell_of
from prep.linked import Home, home_of
from prep.remote import RemoteFile, RetryingFile
from prep.rows import CAPTION_KEYS, TOO_LARGE, Row, SourceError, as_captions, captions_of, make_row
from prep.streams import LocalFile
from prep.units import SourceOptions
from shared.errors import UserError

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
# Columns of text that are taken for pictures: paths, base64, data URIs. Of addresses: if allowed.
NAMED_COLUMNS = (*IMAGE_COLUMNS, "file_name", "image_path", "image_file", "path", "image_base64")
URL_COLUMNS = ("url", "URL", "image_url", "img_url", "picture_url")
KEY_COLUMNS = ("__key__", "id", "url", "URL")
BATCH_ROWS = 16  # read at a time
BATCH_BYTES = 32_000_000  # fewer, where their mean in the row group makes this more
BUFFER_BYTES = 1 << 20
NOT_UTF8 = "text that is not UTF-8"
SHOWN_NAME = 1000  # characters of a picture's path or address that a row's metadata keeps

# What a column may hold. Lists of whole numbers may be a picture's bytes, or anything else.
PICTURE, TEXT, NUMBERS, OTHER = "picture", "text", "numbers", "other"


@dataclass(frozen=True)
class Columns:
    """Which columns are read for what."""

    image: str
    caption: str | None  # None: the first of CAPTION_KEYS that a row has; `a.b` is b of a struct
    key: str | None
    read: tuple[str, ...]  # all but pictures that nobody asked for

    def row(self, found: pa.RecordBatch | pa.Table, number: int, home: Home, most: int) -> Row:
        """The one row of `found`, whose picture of up to `most` bytes it holds or names."""
        return self.row_of(*record_of(found), number, home, most)

    def row_of(
        self, record: Mapping[str, Any], problem: str, number: int, home: Home, most: int
    ) -> Row:
        """The same of a record, which may have a problem already."""
        cell = cell_of(record[self.image])
        data, problem = cell.data, problem or cell.problem
        if data is None and cell.name and not problem:
            data, problem = home.picture(cell.name, most)
        if data is not None and len(data) > most:
            data, problem = None, TOO_LARGE
        metadata = {name: value for name, value in record.items() if name != self.image}
        if isinstance(record[self.image], str) and cell.name and len(cell.name) <= SHOWN_NAME:
            metadata[self.image] = cell.name
        if self.caption is None:
            captions = captions_of(metadata)
        else:
            captions = as_captions(_reached(metadata, self.caption))
        key = self._key(metadata, cell.name, number)
        return make_row(key, data, captions, metadata, problem)

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
    wanted = {image, options.key_column, *captions}
    read = (name for name in columns if kinds[name] != PICTURE or name in wanted)
    return Columns(image, options.caption_column, options.key_column, tuple(read))


def _image_column(
    kinds: Mapping[str, str], columns: Sequence[str], options: SourceOptions
) -> str | None:
    texts = (*CAPTION_KEYS, options.caption_column)  # which may be bytes, too
    pictures = [name for name in columns if kinds[name] == PICTURE and name not in texts]
    usual = [name for name in IMAGE_COLUMNS if kinds.get(name) in (PICTURE, NUMBERS)]
    if usual:
        return usual[0]
    if pictures:
        return pictures[0] if len(pictures) == 1 else None
    if _is_account(columns):
        return None
    named = (*NAMED_COLUMNS, *URL_COLUMNS) if options.allow_external_images else NAMED_COLUMNS
    return next((name for name in named if kinds.get(name) == TEXT), None)


def _no_pictures(columns: Sequence[str]) -> str:
    """What to do about a table in which no column of pictures is found."""
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


def arrow_kind(kind: pa.DataType) -> str:
    """What a column of this Arrow type may hold."""
    types = pa.types
    if types.is_dictionary(kind):
        return arrow_kind(kind.value_type)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return PICTURE
    if types.is_fixed_size_binary(kind):
        return PICTURE
    if types.is_struct(kind):
        inner = [arrow_kind(field.type) for field in kind if field.name in ("bytes", "path")]
        return PICTURE if inner and OTHER not in inner else OTHER
    if _is_list(kind):
        if types.is_integer(kind.value_type):
            return PICTURE if kind.value_type.bit_width == 8 else NUMBERS
        inner_kind = arrow_kind(kind.value_type)
        # Lists of lists of numbers are pixels, not files.
        return OTHER if _is_list(kind.value_type) and inner_kind != TEXT else inner_kind
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return TEXT if text or types.is_null(kind) else OTHER


def column_kinds(schema: pa.Schema) -> dict[str, str]:
    """The kind of each column, and of each field of a struct, or of a list of them, within."""
    kinds = {}
    for field in schema:
        kinds[field.name] = arrow_kind(field.type)
        inner = field.type
        while _is_list(inner):
            inner = inner.value_type
        if kinds[field.name] == OTHER and pa.types.is_struct(inner):
            kinds |= {f"{field.name}.{one.name}": arrow_kind(one.type) for one in inner}
    return kinds


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    plain = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return plain or types.is_list_view(kind) or types.is_large_list_view(kind)


def record_of(found: pa.RecordBatch | pa.Table) -> tuple[dict[str, Any], str]:
    """The one row's values; without those that are text and no UTF-8, which is a problem."""
    try:
        (record,) = found.to_pylist()
        return record, ""
    except UnicodeDecodeError:
        values = {}
        for name in found.column_names:
            with contextlib.suppress(UnicodeDecodeError):
                (values[name],) = found.column(name).to_pylist()
        return {name: values.get(name) for name in found.column_names}, NOT_UTF8


def _reached(value: Any, name: str) -> Any:
    """The value of `name`, or of `column.field`: in a list of structs, each one's."""
    if isinstance(value, list):
        return [_reached(one, name) for one in value]
    if not isinstance(value, Mapping):
        return None
    if name in value:
        return value[name]
    column, dot, field = name.partition(".")
    return _reached(value.get(column), field) if dot else None


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
                        yield columns.row(batch.slice(one, 1), number, home, most)
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
