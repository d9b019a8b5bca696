"""Rows of Hugging Face datasets: a `save_to_disk` folder, an `.arrow` file, or one of the hub.

With `--key-column` rows go to units by hash of their key, so that inserting rows moves no other row
to another unit. Without it units are ranges of 1,024 rows, which shift when rows are inserted. Of a
dataset that has changed in either way all units are read again: it has one fingerprint. What the
cache has of them is copied, and only new pictures and captions are encoded.
With `--streaming` each of the dataset's own shards is a unit, and nothing is downloaded beforehand.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prep.remote import RemoteFile
from prep.rows import Row, SourceError
from prep.streams import LocalFile
from prep.tables import OTHER, PICTURE, Columns, arrow_kind, choose_columns
from prep.units import UNIT_ROWS, SourceOptions, Unit, power_of_two, printable, unit_name
from shared.errors import UserError

if TYPE_CHECKING:
    import datasets

# hf://OWNER/NAME, hf://OWNER/NAME:SPLIT, hf://OWNER/NAME:CONFIG:SPLIT; a split may be
# `train[:10%]`. fsspec has hf://datasets/OWNER/NAME/FILE and the like.
NAME = r"hf://(?!(?:datasets|spaces|models|buckets)/)([\w.-]+/[\w.-]+)"
HUB = re.compile(NAME + r"(?::([\w.-]+)(?=:))?(?::(\S+))?")
SHARD_ROWS = 1 << 40  # more than a shard has: its rows' occurrences begin at a multiple


@dataclass(frozen=True)
class DatasetSource:
    """Which dataset; opened anew, or from memory, in every process."""

    source: str
    location: str  # a folder, a file, or a name on the hub
    split: str | None = None  # of one on the hub
    config: str | None = None  # likewise, where it has several


@dataclass(frozen=True)
class RangeReader:
    """Reads some rows of a dataset that can be indexed."""

    dataset: DatasetSource
    columns: Columns
    max_image_bytes: int
    start: int = 0
    stop: int = 0
    part: tuple[int, int] | None = None  # instead of a range: hash of the key mod the second

    def rows(self) -> Iterator[Row]:
        """The rows, one at a time: their pictures may be large."""
        indices = self._indices()
        with _told(self.dataset.source, SourceError):
            data = _load(self.dataset).select_columns(list(self.columns.read))
            tables = data.select(indices).with_format("arrow").iter(1)
        for number in indices:
            with _told(self.dataset.source, SourceError):
                (record,) = next(tables).to_pylist()
            _read_picture(record, self.columns.image, self.max_image_bytes)
            yield self.columns.row(record, int(number), self.max_image_bytes)

    def sample(self) -> tuple[int, int]:
        """Never asked: the rows are known."""
        return len(self._indices()), 0

    def _indices(self) -> range | NDArray[np.int64]:
        if self.part is None:
            return range(self.start, self.stop)
        number, units = self.part
        return np.flatnonzero(_key_hashes(self.dataset, self.columns) % units == number)


@dataclass(frozen=True)
class ShardReader:
    """Reads one shard of a streaming dataset."""

    dataset: DatasetSource
    columns: Columns
    max_image_bytes: int
    shard: int
    shards: int

    def rows(self) -> Iterator[Row]:
        """The rows in the shard's order."""
        with _told(self.dataset.source, SourceError):
            data, _ = _stream(self.dataset)
            records = iter(data.shard(self.shards, self.shard).decode(False))
        number = 0
        while True:
            with _told(self.dataset.source, SourceError):
                record = next(records, None)
            if record is None:
                return
            _read_picture(record, self.columns.image, self.max_image_bytes)
            kept = {name: record[name] for name in self.columns.read}
            yield self.columns.row(kept, number, self.max_image_bytes)
            number += 1

    def sample(self) -> tuple[int, int]:
        """Unknown without downloading the shard."""
        return 0, 0


def dataset_units(name: str, options: SourceOptions) -> list[Unit]:
    """The units of the dataset that `name` stands for: a path, or `hf://owner/name[:split]`.

    Raises UserError where it cannot be opened or has no columns of pictures and captions.
    """
    source = _source(name, options.dataset_config_name)
    if options.streaming and source.split is not None:
        return _streaming_units(source, options)
    with _told(source.source, UserError):
        data = _load(source)
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
            reader=RangeReader(source, columns, options.max_image_bytes, start, stop),
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
    units = options.folder_units or power_of_two(len(hashes) / UNIT_ROWS)
    if units < 1 or units & (units - 1):
        raise UserError(f"--folder-units {units} is not a power of two")
    counts = np.bincount(hashes % units, minlength=units)
    return [
        Unit(
            name=unit_name(f"{base}-{number}of{units}", source.source),
            source=printable(source.source),
            state=state,
            reader=RangeReader(source, columns, options.max_image_bytes, part=(number, units)),
            rows_known=int(counts[number]),
        )
        for number in range(units)
        if counts[number]
    ]


def _streaming_units(source: DatasetSource, options: SourceOptions) -> list[Unit]:
    with _told(source.source, UserError):
        data, version = _stream(source)
        if data.features is None:
            data = data._resolve_features()
    columns = _columns(source, data.features, options)
    shards = data.num_shards
    return [
        Unit(
            name=unit_name(f"{Path(source.location).name}-{shard}of{shards}", source.source),
            source=source.source,
            state={"fingerprint": version, "shard": [shard, shards], **columns.state()},
            reader=ShardReader(source, columns, options.max_image_bytes, shard, shards),
            first_occurrence=shard * SHARD_ROWS,
        )
        for shard in range(shards)
    ]


def is_saved_dataset(path: Path) -> bool:
    """Did `save_to_disk` write this folder?"""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def _source(name: str, config: str | None) -> DatasetSource:
    if found := HUB.fullmatch(name):
        config, split = found[2] or config, found[3] or "train"
        source = ":".join(filter(None, (f"hf://{found[1]}", config, split)))
        return DatasetSource(source, found[1], split, config)
    path = Path(name)
    if (path / "dataset_dict.json").is_file():  # several splits
        splits = sorted(one.name for one in path.iterdir() if is_saved_dataset(one))
        if "train" not in splits:
            there = ", ".join(f"{path}/{split}" for split in splits) or "none"
            raise UserError(f"{path} has no split train; name one of its splits: {there}")
        path = path / "train"
    return DatasetSource(str(path), str(path))


@lru_cache(maxsize=4)
def _load(source: DatasetSource) -> datasets.Dataset:
    """The dataset, memory-mapped, with its pictures left as they are."""
    import datasets

    if source.split is not None:
        data = datasets.load_dataset(source.location, source.config, split=source.split)
    elif source.location.endswith(".arrow"):
        data = datasets.Dataset.from_file(source.location)
    else:
        data = datasets.load_from_disk(source.location)
    fingerprint = data._fingerprint
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    data._fingerprint = fingerprint  # a cast gives it another, and that may change with versions
    return data


@lru_cache(maxsize=4)
def _stream(source: DatasetSource) -> tuple[datasets.IterableDataset, str]:
    """A streaming dataset and its version: of one on the hub, the commit."""
    import datasets

    builder = datasets.load_dataset_builder(source.location, source.config)
    return builder.as_streaming_dataset(split=source.split), str(builder.hash)


@lru_cache(maxsize=4)
def _key_hashes(source: DatasetSource, columns: Columns) -> NDArray[np.uint32]:
    """32 bits of a hash of every row's key, 4 bytes a row."""
    assert columns.key is not None
    with _told(source.source, SourceError):
        keys = _load(source).select_columns([columns.key])
        digests = [
            hashlib.sha256(str(record[columns.key]).encode("utf-8", "surrogatepass")).digest()[:4]
            for record in keys
        ]
    return np.frombuffer(b"".join(digests), dtype=">u4").astype(np.uint32)


def _fingerprint(source: DatasetSource, data: datasets.Dataset) -> str:
    """What changes with the content: of a bare file, its size and time."""
    if source.location.endswith(".arrow"):
        stat = Path(source.location).stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"
    return str(data._fingerprint)


def _columns(source: DatasetSource, features: Any, options: SourceOptions) -> Columns:
    import datasets

    def kind(feature: Any) -> str:
        if isinstance(feature, datasets.Image):
            return PICTURE
        try:
            return arrow_kind(datasets.Features({"column": feature}).arrow_schema[0].type)
        except (TypeError, ValueError):
            return OTHER

    kinds = {name: kind(feature) for name, feature in features.items()}
    return choose_columns(source.source, kinds, options)


def _read_picture(record: dict[str, Any], column: str, most: int) -> None:
    """Pictures of an `imagefolder` are files of their own, read to `most` bytes and one more."""
    picture = record[column]
    if not isinstance(picture, dict) or picture.get("bytes") is not None:
        return
    path = picture.get("path") or ""
    if "://" in path:
        with RemoteFile(path).open() as file:
            record[column] = {**picture, "bytes": file.read(most + 1)}
    elif path:
        with suppress(OSError, ValueError):  # "no picture"
            if Path(path).is_file():  # reading a pipe would wait for ever
                with LocalFile(path).open() as local:
                    record[column] = {**picture, "bytes": local.read(most + 1)}


@contextmanager
def _told(source: str, kind: type[UserError]) -> Iterator[None]:
    """What goes wrong in `datasets`, which raises all kinds of errors, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise kind(f"{source} cannot be read: {words}") from None
