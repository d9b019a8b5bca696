"""Parquet files: columns found, keys stable, damage told."""

import datasets
import pyarrow as pa
import pytest

from prep.sources.find import estimate_rows, find_units
from shared.errors import UserError
from tests.support.sources import (
    accounts,
    encode,
    manifest,
    png,
    prep,
    refusal,
    units,
)
from tests.support.tables import records, rows_of, write_parquet

PNG = png(1)
CAPTIONS = ["a star", "a ring", "a disc"]


# --- Parquet ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", ["bytes", "struct"])
def test_pictures_as_bytes_or_as_a_struct(tmp_path, pictures):
    columns = records(3, similarity=lambda n: n / 10)
    if pictures == "bytes":
        columns["image"] = [picture["bytes"] for picture in columns["image"]]
    rows = rows_of(write_parquet(tmp_path / "a.parquet", columns))
    keys = ["0", "1", "2"] if pictures == "bytes" else ["0000.png", "0001.png", "0002.png"]
    assert list(rows) == keys
    assert [row.image for row in rows.values()] == [png(n) for n in range(3)]
    assert [row.captions for row in rows.values()] == [(f"picture number {n}",) for n in range(3)]
    assert [row.metadata["similarity"] for row in rows.values()] == [0, 0.1, 0.2]


def test_parquet_through_the_whole_stage(tmp_path):
    columns = records(6, license=lambda n: "nc" if n % 2 else "cc0")
    columns["image"][2] = {"bytes": b"no picture", "path": "2"}
    columns["image"][4] = None
    parquet = write_parquet(tmp_path / "a.parquet", columns)
    flags = {"max_reject_fraction": 1.0, "where": "license == 'cc0'"}
    cache = encode(parquet, tmp_path / "cache", **flags)
    assert {row["source_key"]: row["reason"] for row in accounts(cache)} == {
        "0000.png": "", "0001.png": "where", "2": "cannot be decoded", "0003.png": "where",
        "4": "no picture", "0005.png": "where",
    }  # fmt: skip
    assert manifest(cache)["totals"]["read"] == 6


@pytest.mark.parametrize(
    ("columns", "key"),
    [
        ({"__key__": ["k"], "id": [7]}, "k"), ({"id": [7], "url": ["u"]}, "7"),
        ({"URL": ["u"]}, "u"), ({}, "0"),
    ],
)  # fmt: skip
def test_where_keys_come_from(tmp_path, columns, key):
    table = {"jpg": [PNG], "caption": ["a"], "other": ["o"], **columns}
    parquet = write_parquet(tmp_path / "a.parquet", table)
    assert list(rows_of(parquet)) == [key]
    assert list(rows_of(parquet, key_column="other")) == ["o"]


def test_columns_by_flag_and_by_type(tmp_path):
    table = {"thumb": [PNG], "photo": [png(2)], "alt": ["b"], "caption": [["", "a", "c"]]}
    parquet = write_parquet(tmp_path / "a.parquet", table)
    with pytest.raises(UserError, match=r"thumb, photo, alt, caption.*--image-column"):
        rows_of(parquet)
    (row,) = rows_of(parquet, image_column="photo").values()
    assert (row.image, row.captions) == (png(2), ("a", "c"))
    assert "thumb" not in row.metadata  # nobody asked for its bytes
    (row,) = rows_of(parquet, image_column="thumb", caption_column="alt").values()
    assert (row.image, row.captions) == (PNG, ("b",))
    only = write_parquet(tmp_path / "b.parquet", {"photo": [PNG], "caption": ["a"]})
    assert next(iter(rows_of(only).values())).image == PNG


@pytest.mark.parametrize(
    ("columns", "flags", "named"),
    [
        ({"a": [1], "caption": ["x"]}, [], "--image-column"),
        ({"image": [PNG], "label": ["x"]}, [], "--caption-column"),
        ({"image": [PNG], "caption": [3]}, [], "--caption-column"),
        ({"image": [PNG], "label": ["x"]}, ["--caption-column", "lable"], "'lable'"),
        ({"image": [PNG], "caption": ["x"]}, ["--key-column", "id"], "--key-column 'id'"),
        ({"image": [PNG], "caption": ["x"], "n": [1]}, ["--image-column", "n"], "--image-column"),
    ],
)
def test_columns_that_are_not_there_are_one_line(tmp_path, columns, flags, named):
    parquet = write_parquet(tmp_path / "a.parquet", columns)
    words = ["--shards", parquet, "--model", "tiny-sd", "--cache", tmp_path / "c"]
    line = refusal("encode", *words, *flags)
    assert named in line
    assert f"has the columns {', '.join(columns)}" in line
    assert not (tmp_path / "c").exists()


def test_a_caption_column_counts_when_it_changes(tmp_path):
    parquet = write_parquet(tmp_path / "a.parquet", records(2, other=lambda n: f"other {n}"))
    cache = encode(parquet, tmp_path / "cache")
    encode(parquet, cache, caption_column="other")
    assert {row["captions"][0] for row in accounts(cache)} == {"other 0", "other 1"}


def test_pictures_too_large_are_rejected(tmp_path):
    table = {"image": [PNG, PNG + bytes(30_000)], "caption": ["a", "b"], "id": ["x", "y"]}
    rows = rows_of(write_parquet(tmp_path / "a.parquet", table), max_image_bytes=20_000)
    assert [row.problem for row in rows.values()] == ["", "larger than --max-image-bytes"]


def test_memory_is_bounded_by_the_row_groups(tmp_path):
    """100 MB of pictures are read by the row group of 10 MB."""
    count, size = 100, 1_000_000
    rng = __import__("numpy").random.default_rng(0)
    table = {"image": [rng.bytes(size) for _ in range(count)], "caption": ["a"] * count}
    parquet = write_parquet(tmp_path / "a.parquet", table, row_group_size=10)
    del table
    before, peak = pa.total_allocated_bytes(), 0
    for unit in find_units([str(parquet)]):
        for _ in unit.rows():
            peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 4 * 10 * size


@pytest.mark.parametrize("cut", [4, 500, -8, -1])
def test_damaged_parquet_costs_its_unit_only(tmp_path, cut):
    good = write_parquet(tmp_path / "b.parquet", records(3))
    bad = write_parquet(tmp_path / "a.parquet", records(3))
    bad.write_bytes(bad.read_bytes()[:cut])
    words = ["--model", "tiny-sd", "--cache", tmp_path / "c", "--threads", 1]
    line = refusal("encode", "--shards", bad, good, *words)
    assert "a.parquet is not a whole Parquet file" in line
    assert [unit["source"] for unit in units(tmp_path / "c").values()] == [str(good)]


def test_rows_of_parquet_are_counted_by_the_footer(tmp_path):
    (unit,) = find_units([str(write_parquet(tmp_path / "a.parquet", records(7)))])
    assert estimate_rows([unit]) == {unit.name: 7}


# --- the hub ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "dataset", "keyed"])
def test_originals_are_found_again_with_the_columns_that_were_named(tmp_path, kind):
    columns = {
        "thumb": [png(90 + n) for n in range(3)], "photo": [png(n) for n in range(3)],
        "alt": CAPTIONS, "name": ["x", "y", "z"],
    }  # fmt: skip
    flags = ["--image-column", "photo", "--caption-column", "alt"]
    if kind == "parquet":
        source = write_parquet(tmp_path / "a{1}[2].parquet", columns)
        typed = tmp_path / "a\\{1\\}[[]2].parquet"
    else:
        typed = source = tmp_path / "data"
        datasets.Dataset.from_dict(columns).save_to_disk(source)
    flags += ["--key-column", "name"] if kind == "keyed" else []
    cache = tmp_path / "cache"
    words = ("--model", "tiny-sd", "--cache", cache, "--threads", 1)
    assert prep("encode", "--shards", typed, *words, *flags).status == 0
    answer = prep("verify", "--cache", cache, "--reencode", 3)
    assert "encoded again: 3 samples" in answer.err
    assert "not compared" not in answer.err
    assert answer.status == 0
    assert (cache / "report.html").read_text().count(" dB") >= 3


def test_another_limit_of_bytes_reads_again_what_it_may_concern(tmp_path):
    columns = records(3)
    columns["image"][1] = png(1, 300, 300)  # 200 kB
    parquet = write_parquet(tmp_path / "a.parquet", {**columns, "image": [
        one if isinstance(one, bytes) else one["bytes"] for one in columns["image"]
    ]})  # fmt: skip
    cache = tmp_path / "cache"
    reasons = []
    for limit in (50_000, 50_000, 500_000, 50_000, None):
        flags = {} if limit is None else {"max_image_bytes": limit}
        before = units(cache) if cache.exists() else {}
        encode(parquet, cache, **flags)
        reasons.append([row["reason"] for row in accounts(cache) if row["reason"]])
        assert (units(cache) == before) == (len(reasons) == 2)
    large = ["larger than --max-image-bytes"]
    assert reasons == [large, large, [], large, []]
