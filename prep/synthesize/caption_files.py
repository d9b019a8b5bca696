"""What `--captions` names, read: rows of a text file, jsonl, a Parquet file or a dataset."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from prep.files.remote import RemoteFile
from prep.files.stream import LocalFile
from prep.rows.character_encoding import UnreadableText, decode_json_text, decode_text
from prep.rows.row import (
    CAPTION_KEYS,
    LONG_CAPTION,
    MAX_CAPTION,
    NO_CAPTION,
    as_captions,
)
from prep.rows.unit import stem
from prep.sources.braces import expand_braces
from prep.sources.folders.metadata import json_rows
from prep.sources.patterns import is_url, local_path, matches
from prep.sources.tables import open_dataset
from prep.sources.tables.column_kinds import PICTURE, TEXT, column_kinds, records_of
from prep.sources.tables.hf_dataset import feature_kinds, tell_split
from prep.sources.tables.open_dataset import HUB, dataset_source, is_saved_dataset, told
from prep.sources.tables.parquet import open_parquet, reached
from prep.synthesize.config import SynthesizeConfig
from shared.errors import UserError
from shared.sanitize import printable
from shared.storage.reading import read_file
from shared.storage.urls import place

BATCH_ROWS = 1024  # of a table, read at a time
JSON = (".jsonl", ".ndjson", ".json")
OTHERS = {".csv": "a table of text", ".tsv": "a table of text", ".tar": "a tar"}
READ = "text (a caption a line), jsonl and Parquet are read"
KEPT_KEY = 256  # characters of a caption that is too long to be one


@dataclass(frozen=True)
class CaptionRow:
    """A caption and the name of its row, or why the row has none."""

    key: str
    caption: str
    problem: str = ""


@dataclass(frozen=True)
class CaptionFile:
    """One source: its name as typed, the readable part of its units' names, and its rows."""

    source: str
    name: str
    rows: tuple[CaptionRow, ...]


def read_captions(config: SynthesizeConfig) -> list[CaptionFile]:
    """Read all that `--captions` names. Raises UserError where there are no captions in it."""
    found: dict[str, CaptionFile] = {}
    for text in config.captions:
        for name in names_of(text):
            one = read_source(name, config)
            if not one.rows:
                raise UserError(f"{one.source} holds no captions; leave it out of --captions")
            found[one.source] = one
    if not any(HUB.fullmatch(source) for source in found):
        for flag in ("streaming", "dataset_config_name"):
            if getattr(config, flag):
                raise UserError(
                    f"--{flag.replace('_', '-')} is for datasets of the hub (hf://); --captions "
                    "has none"
                )
    return list(found.values())


def names_of(text: str) -> list[str]:
    """Paths, URLs and datasets that a text of `--captions` stands for."""
    if os.path.lexists(path := local_path(text)):
        return [os.path.normpath(path)]
    found = []
    for name in expand_braces(text):
        if HUB.fullmatch(name) or is_url(name):
            found.append(name)
        elif here := [path for path in matches(name) if os.path.lexists(path)]:
            found += map(os.path.normpath, here)
        else:
            raise UserError(f"--captions: nothing matches {printable(name)!r}")
    return found


def read_source(name: str, config: SynthesizeConfig) -> CaptionFile:
    """Read one of them. Raises UserError for what holds no captions."""
    remote = is_url(name)
    if HUB.fullmatch(name) or (not remote and is_dataset(Path(name))):
        return read_dataset(name, config)
    if not remote and Path(name).is_dir():
        raise UserError(f"{printable(name)} is a folder; name the files of captions in it")
    ending = PurePosixPath(name.partition("?")[0]).suffix.lower()
    if ending in OTHERS:
        raise UserError(f"{printable(name)} is {OTHERS[ending]}; {READ}")
    if ending == ".parquet":
        rows = read_parquet(RemoteFile(name) if remote else LocalFile(name), config)
    else:
        content = read_file(place(name) if remote else Path(name))
        rows = read_lines(name, content, ending in JSON, config)
    return CaptionFile(printable(name), stem(name), tuple(rows))


def is_dataset(path: Path) -> bool:
    """Is it a folder that `save_to_disk` wrote, or an Arrow file?"""
    return path.suffix == ".arrow" or is_saved_dataset(path)


def read_lines(
    name: str, content: bytes, is_json: bool, config: SynthesizeConfig
) -> Iterator[CaptionRow]:
    """Rows of jsonl or of a text with a caption a line; blank lines are none."""
    decode = decode_json_text if is_json else decode_text
    try:
        text = decode(content, config.caption_encoding)
    except UnreadableText as error:
        raise UserError(f"{printable(name)} is {error}") from None
    if not is_json:
        for flag in ("caption_column", "key_column"):
            if getattr(config, flag):
                raise UserError(
                    f"--{flag.replace('_', '-')} is for tables and jsonl; {printable(name)} is text"
                )
        lines = (line.strip() for line in text.split("\n"))
        return (row_of(line, [line], "") for line in lines if as_captions(line))
    records = [said(one) for one in json_rows(text, Path(name))]
    kinds = {str(key): TEXT for record in records for key in record}
    columns = choose_column(printable(name), kinds, config)
    return rows_of(records, columns, config)


def said(value: Any) -> Mapping[str, Any]:
    """Give a row of a JSON list as an object: a bare string, or a list of them, is its caption."""
    return value if isinstance(value, Mapping) else {CAPTION_KEYS[0]: value}


def read_parquet(file: LocalFile | RemoteFile, config: SynthesizeConfig) -> Iterator[CaptionRow]:
    """Rows of a Parquet file, of which only the columns asked for are read."""
    with open_parquet(file) as parquet:
        columns = choose_column(file.source, column_kinds(parquet.schema_arrow), config)
        read = top_level(columns, parquet.schema_arrow.names, config)
        for batch in parquet.iter_batches(BATCH_ROWS, columns=read):
            yield from rows_of(records_of(batch), columns, config)


def read_dataset(name: str, config: SynthesizeConfig) -> CaptionFile:
    """Rows of a dataset on the hub or on the disk; its pictures, if it has any, are not read."""
    source = dataset_source(name, config.dataset_config_name)
    streamed = config.streaming and source.split is not None
    with told(source.source, UserError):
        opened = (open_dataset.stream if streamed else open_dataset.load)(source)
        tell_split(name, opened)
        columns = choose_column(source.source, feature_kinds(opened.data.features), config)
        read = top_level(columns, list(opened.data.features), config)
        data = opened.data.select_columns(read)
        if streamed:
            rows = tuple(rows_of(data, columns, config))
        else:
            tables = data.with_format("arrow").iter(BATCH_ROWS)
            records = (record for table in tables for record in records_of(table))
            rows = tuple(rows_of(records, columns, config))
    base = "-".join(filter(None, (Path(source.location).name, source.split)))
    return CaptionFile(printable(source.source), base, rows)


def choose_column(
    source: str, kinds: Mapping[str, str], config: SynthesizeConfig
) -> tuple[str, ...]:
    """Where captions are: as flagged, else under the usual names, else the only text.

    Raises UserError, with the columns there are, where none will do.
    """
    names = [name for name in kinds if "." not in name or name.partition(".")[0] not in kinds]
    there = f"{source} has the columns {', '.join(map(printable, names)) or 'none at all'}"
    if config.key_column is not None and config.key_column not in names:
        raise UserError(f"--key-column {config.key_column!r}: {there}")
    if config.caption_column is not None:
        if config.caption_column not in kinds:
            raise UserError(f"--caption-column {config.caption_column!r}: {there}")
        return (config.caption_column,)
    usual = tuple(name for name in CAPTION_KEYS if kinds.get(name) in (TEXT, PICTURE))  # or bytes
    texts = [name for name in names if kinds[name] == TEXT and name != config.key_column]
    if not usual and len(texts) != 1:
        raise UserError(f"{there}: which one holds the captions? Say --caption-column NAME")
    return usual or (texts[0],)


def top_level(columns: Sequence[str], there: Sequence[str], config: SynthesizeConfig) -> list[str]:
    """Columns of the table that hold these, which may be fields of structs, and the key."""
    names = (*columns, *filter(None, (config.key_column,)))
    tops = (name if name in there else name.partition(".")[0] for name in names)
    return list(dict.fromkeys(tops))


def rows_of(
    records: Iterable[Mapping[str, Any]], columns: Sequence[str], config: SynthesizeConfig
) -> Iterator[CaptionRow]:
    """Every caption of each record, or a row that says why it has none."""
    for record in records:
        key = record.get(config.key_column) if config.key_column else None
        captions, problem = captions_in(record, columns, config.caption_encoding)
        for caption in captions or [""]:
            name = caption if key is None else str(key)
            yield row_of(name, [caption] if caption else [], problem)


def captions_in(
    record: Mapping[str, Any], columns: Sequence[str], encoding: str | None
) -> tuple[Sequence[str], str]:
    """Take the captions of the first column that has any, or say why there are none."""
    for name in columns:
        value = reached(record, name)
        try:
            if isinstance(value, bytes):
                value = decode_text(value, encoding)
        except UnreadableText as error:
            return (), f"its caption is {error}"
        if found := as_captions(value):
            return found, ""
    return (), ""


def row_of(key: str, captions: Sequence[str], problem: str) -> CaptionRow:
    """Make a row, with its problem if it has no caption or an endless one."""
    if not captions:
        return CaptionRow(key, "", problem or NO_CAPTION)
    if len(captions[0]) > MAX_CAPTION:
        return CaptionRow(key[:KEPT_KEY], "", LONG_CAPTION)
    return CaptionRow(key, captions[0])
