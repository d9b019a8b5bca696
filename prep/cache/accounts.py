"""Reading samples/*.parquet, the accounts of every input row, piece by piece."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shared.cache.paths import CachePaths
from shared.cache.units import UnitRecord
from shared.storage.reading import NotAFile, open_regular
from shared.storage.urls import Place

COLUMNS = ("key", "source_key", "captions", "image_sha256", "status", "reason")
BATCH_ROWS = 4096


def accounts(cache: CachePaths, unit: UnitRecord, keys: Collection[str]) -> list[dict[str, Any]]:
    """Read the rows of the unit's accounting table with these keys; none where it is gone."""
    wanted = pa.array(sorted(keys), pa.string())
    return [
        row
        for batch in account_batches(cache.root / unit.samples)
        for row in batch.filter(pc.is_in(batch["key"], wanted)).to_pylist()
    ]


def account_batches(path: Place) -> Iterator[pa.RecordBatch]:
    """Read an accounting table piece by piece, with those of `COLUMNS` that it has."""
    try:
        # What a reader would wait for raises NotAFile.
        opened = open_regular(path) if isinstance(path, Path) else path.open("rb")
        with opened as file, pq.ParquetFile(file) as table:
            columns = [name for name in COLUMNS if name in table.schema_arrow.names]
            if all(is_ours(table.schema_arrow.field(name)) for name in columns):
                yield from table.iter_batches(batch_size=BATCH_ROWS, columns=columns)
    except (OSError, pa.ArrowException, NotAFile):
        return  # missing or damaged, which is for `prep verify` to say


def is_ours(column: pa.Field) -> bool:
    """Is a column of the type that `prep encode` gives it: text, or for captions lists of it?"""
    kind = column.type
    if column.name == "captions":
        return bool(pa.types.is_list(kind) and pa.types.is_string(kind.value_type))
    return bool(pa.types.is_string(kind))
