"""Rows of tables, as Parquet files and datasets have them."""

import pickle

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from prep.sources.find import SourceOptions, find_units
from tests.support.sources import (
    png,
)


def records(count, **more):
    rows = range(count)
    return {
        "image": [{"bytes": png(n), "path": f"{n:04d}.png"} for n in rows],
        "text": [f"picture number {n}" for n in rows],
        **{name: [value(n) for n in rows] for name, value in more.items()},
    }


def dataset(count, **more):
    data = datasets.Dataset.from_dict(records(count, **more))
    return data.cast_column("image", datasets.Image())


def rows_of(*sources, **options):
    """`key -> row`, read by units that went to another process."""
    found = pickle.loads(
        pickle.dumps(find_units(list(map(str, sources)), SourceOptions(**options)))
    )
    return {row.key: row for unit in found for row in unit.rows()}


def write_parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path
