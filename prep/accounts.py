"""Reading samples/*.parquet, the accounts of every input row, piece by piece."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shared.cache import CachePaths, UnitRecord
from shared.places import Place

COLUMNS = ("key", "source_key", "captions", "image_sha256", "status", "reason")
BATCH_ROWS = 4096


def accounts(cache: CachePaths, unit: UnitRecord, keys: Collection[str]) -> list[dict[str, Any]]:
    """The rows of the unit's accounting table with these keys; none where it is gone."""
    wanted = pa.array(sorted(keys), pa.string())
    return [
        row
        for batch in account_batches(cache.root / unit.samples)
        for row in batch.filter(pc.is_in(batch["key"], wanted)).to_pylist()
    ]


def account_batches(path: Place) -> Iterator[pa.RecordBatch]:
    """An accounting table piece by piece, with those of `COLUMNS` that it has."""
    try:
        with path.open("rb") as file, pq.ParquetFile(file) as table:
            columns = [name for name in COLUMNS if name in table.schema_arrow.names]
            yield from table.iter_batches(batch_size=BATCH_ROWS, columns=columns)
    except (OSError, pa.ArrowInvalid):
        return  # missing or damaged, which is for `prep verify` to say
