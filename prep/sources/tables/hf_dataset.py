"""Rows of Hugging Face datasets: a `save_to_disk` folder, an `.arrow` file, or one of the hub.

With `--key-column` rows go to units by hash of their key, so that inserting rows moves no other row
to another unit. Without it units are ranges of 1,024 rows, which shift when rows are inserted. Of a
dataset that has changed in either way all units are read again: it has one fingerprint. What the
cache has of them is copied, and only new pictures and captions are encoded.
With `--streaming` each of the dataset's own shards is a unit, and nothing is downloaded beforehand.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prep.rows.row import Row, SourceError
from prep.rows.unit import UNIT_ROWS, Reader, SourceOptions, Unit, count_units, unit_name
from prep.sources.tables.column_kinds import OTHER, column_kinds, record_of
from prep.sources.tables.open_dataset import (
    HUB,
    DatasetSource,
    Opened,
    dataset_source,
    say_split,
    told,
)
from prep.sources.tables.open_dataset import load as _load
from prep.sources.tables.open_dataset import stream as _stream
from prep.sources.tables.parquet import Columns, choose_columns
from shared.errors import UserError
from shared.sanitize import printable

if TYPE_CHECKING:
    import datasets

NO_PICTURES = ("Audio", "Video", "Pdf", "Nifti")  # features that are bytes and path, too
SHARD_ROWS = 1 << 40  # more than a shard has: its rows' occurrences begin at a multiple


@dataclass(frozen=True)
class RangeReader(Reader):
    """Reads some rows of a dataset that can be indexed."""

    dataset: DatasetSource
    columns: Columns
    options: SourceOptions
    start: int = 0
    stop: int = 0
    part: tuple[int, int] | None = None  # instead of a range: hash of the key mod the second

    def rows(self) -> Iterator[Row]:
        """Read the rows, one at a time: their pictures may be large."""
        indices = self._indices()
        with told(self.dataset.source, SourceError):
            opened = _load(self.dataset)
            data = opened.data.select_columns(list(self.columns.read))
            tables = data.select(indices).with_format("arrow").iter(1)
        home = replace(opened.home, anywhere=self.options.allow_external_images)
        for number in indices:
            with told(self.dataset.source, SourceError):
                row = next(tables)
            yield self.columns.row(record_of(row), int(number), home, self.options.max_image_bytes)

    def _indices(self) -> range | NDArray[np.int64]:
        if self.part is None:
            return range(self.start, self.stop)
        number, units = self.part
        return np.flatnonzero(_key_hashes(self.dataset, self.columns) % units == number)


@dataclass(frozen=True)
class ShardReader(Reader):
    """Reads one shard of a streaming dataset."""

    dataset: DatasetSource
    columns: Columns
    options: SourceOptions
    shard: int
    shards: int

    def rows(self) -> Iterator[Row]:
        """Read the rows in the shard's order."""
        with told(self.dataset.source, SourceError):
            opened = _stream(self.dataset)
            records = iter(opened.data.shard(self.shards, self.shard).decode(False))
        home = replace(opened.home, anywhere=self.options.allow_external_images)
        for number in itertools.count():
            with told(self.dataset.source, SourceError):
                record = next(records, None)
            if record is None:
                return
            kept = {name: record.get(name) for name in self.columns.read}
            yield self.columns.row(kept, number, home, self.options.max_image_bytes)


def dataset_units(name: str, options: SourceOptions) -> list[Unit]:
    """Find the units of the dataset that `name` is: a path, or `hf://owner/name[:split]`.

    Raises UserError where it cannot be opened or has no columns of pictures and captions.
    """
    source = dataset_source(name, options.dataset_config_name)
    options = replace(options, dataset_config_name=None)  # the source has it
    if options.streaming and source.split is not None:
        return _streaming_units(name, source, options)
    with told(source.source, UserError):
        opened = _load(source)
    data = opened.data
    tell_split(name, opened)
    columns = _columns(source, data.features, options)
    base = "-".join(filter(None, (Path(source.location).name, source.split)))
    state = {"fingerprint": _fingerprint(source, data), **columns.state()}
    if options.key_column is not None:
        return _hashed_units(source, columns, base, state, options)
    starts = range(0, len(data), UNIT_ROWS)
    ranges = [(start, min(start + UNIT_ROWS, len(data))) for start in starts]
    return [
        Unit(
            name=unit_name(f"{base}-{number:05d}", source.source),
            source=printable(source.source),
            state=state | {"rows": [start, stop]},
            reader=RangeReader(source, columns, options, start, stop),
            rows_known=stop - start,
            first_occurrence=start,
        )
        for number, (start, stop) in enumerate(ranges)
    ]


def _hashed_units(
    source: DatasetSource, columns: Columns, base: str, state: dict[str, Any],
    options: SourceOptions,
) -> list[Unit]:  # fmt: skip
    hashes = _key_hashes(source, columns)
    units = count_units(options, len(hashes))
    counts = np.bincount(hashes % units, minlength=units)
    return [
        Unit(
            name=unit_name(f"{base}-{number}of{units}", source.source),
            source=printable(source.source),
            state=state,
            reader=RangeReader(source, columns, options, part=(number, units)),
            rows_known=int(counts[number]),
        )
        for number in range(units)
        if counts[number]
    ]


def _streaming_units(name: str, source: DatasetSource, options: SourceOptions) -> list[Unit]:
    with told(source.source, UserError):
        opened = _stream(source)
    tell_split(name, opened)
    columns = _columns(source, opened.data.features, options)
    shards = opened.data.num_shards
    return [
        Unit(
            name=unit_name(f"{Path(source.location).name}-{shard}of{shards}", source.source),
            source=source.source,
            state={"fingerprint": opened.version, "shard": [shard, shards], **columns.state()},
            reader=ShardReader(source, columns, options, shard, shards),
            first_occurrence=shard * SHARD_ROWS,
        )
        for shard in range(shards)
    ]


def tell_split(name: str, opened: Opened) -> None:
    """Of a dataset of the hub: tell that others than `train` are left out, if nobody named it."""
    if (found := HUB.fullmatch(name)) and found[3] is None:
        named = f"hf://{found[1]}" + (f":{found[2]}" if found[2] else "")
        say_split(named, ":", opened.splits)


@lru_cache(maxsize=4)
def _key_hashes(source: DatasetSource, columns: Columns) -> NDArray[np.uint32]:
    """32 bits of a hash of every row's key, 4 bytes a row."""
    assert columns.key is not None
    with told(source.source, SourceError):
        keys = _load(source).data.select_columns([columns.key])
        digests = [
            hashlib.sha256(str(record[columns.key]).encode("utf-8", "surrogatepass")).digest()[:4]
            for record in keys
        ]
    return np.frombuffer(b"".join(digests), dtype=">u4").astype(np.uint32)


def _fingerprint(source: DatasetSource, data: datasets.Dataset) -> str:
    """Give what changes with the content: of a bare file, its size and time."""
    if source.location.endswith(".arrow"):
        stat = Path(source.location).stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"
    return str(data._fingerprint)


def _columns(source: DatasetSource, features: Any, options: SourceOptions) -> Columns:
    return choose_columns(source.source, feature_kinds(features), options)


def feature_kinds(features: Any) -> dict[str, str]:
    """Tell the kind of each of a dataset's columns, as `column_kinds` does."""
    import datasets

    fields = []
    for name, feature in features.items():
        if type(feature).__name__ in NO_PICTURES:
            continue
        with suppress(TypeError, ValueError):  # a kind that has no Arrow type
            fields.append(datasets.Features({name: feature}).arrow_schema[0])
    found = column_kinds(pa.schema(fields))
    return dict.fromkeys(features, OTHER) | found
