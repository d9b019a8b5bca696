"""Filters that decide nothing are refused before anything is encoded, with what the rows have."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.filters.where import Where
from tests.support.sources import accounts, encode, manifest, png, refusal, write_tar


def tar_of(path, *rows):
    """A tar with a picture and a json for each row."""
    files = []
    for number, row in enumerate(rows):
        files += [(f"{number}.png", png(number)), (f"{number}.json", json.dumps(row).encode())]
    return write_tar(path, files)


ROW = {"caption": "a", "similarity": 0.4, "license": "cc0", "score": "0.7", "empty": None}


def refused(tmp_path, *flags, shards=None):
    shards = shards or [tar_of(tmp_path / "a.tar", ROW, ROW)]
    words = ("--model", "tiny-sd", "--cache", tmp_path / "c", "--threads", 1)
    line = refusal("encode", "--shards", *shards, *words, *flags)
    assert not (tmp_path / "c" / "units").exists()
    return line


@pytest.mark.parametrize(
    ("where", "told"),
    [
        (
            "similarty > 0.3",
            "none of the 2 rows looked at has similarty (did you mean similarity?)",
        ),
        ("similarty > 0.3", "they have caption, similarity, license, score, empty"),
        ("similarty > 0.3", "not has(similarty) or similarty > 0.3"),
        ("license == 'cc0' and aesthetic > 5", "has aesthetic"),
        ("license == 'nc' or not aesthetic > 5", "has aesthetic"),
        ("exif in ('a', 'b')", "has exif"),
        ("len(tags) > 3", "has tags"),
        ("score > 0.5", "score is text, such as '0.7'; number(score) makes a number of it"),
        ("similarity == '0.4'", "similarity is such as 0.4"),
        ("empty > 0.5", "empty is null"),
    ],
)
def test_a_part_that_is_unknown_of_every_row_is_refused(tmp_path, where, told):
    assert told in refused(tmp_path, "--where", where)


def test_so_is_a_limit_on_watermarks_that_no_row_tells(tmp_path):
    line = refused(tmp_path, "--max-pwatermark", 0.8)
    assert "has pwatermark" in line
    assert "Leave the flag out" in line
    tar = tar_of(tmp_path / "b.tar", {"caption": "a", "pwatermark": "0.9"})
    assert "pwatermark is text" in refused(tmp_path, "--max-pwatermark", 0.8, shards=[tar])


@pytest.mark.parametrize(
    "where",
    [
        "Similarity > 0.3 and LICENSE != 'nc'",  # other case
        "not has(aesthetic) or aesthetic > 5",  # who says that it may be missing
        "number(score) > 0.5",
        "empty is None",
    ],
)
def test_what_some_row_decides_or_has_asks_for_passes(tmp_path, where):
    cache = encode(tar_of(tmp_path / "a.tar", ROW, ROW), tmp_path / "c", where=where)
    assert manifest(cache)["totals"]["written"] == 2


def test_a_key_that_only_another_source_has_is_found_there(tmp_path):
    first = tar_of(tmp_path / "a.tar", {"caption": "a"})
    more = [tar_of(tmp_path / f"b{n}.tar", {"caption": "b", "score": n}) for n in range(2)]
    cache = encode([first, *more], tmp_path / "c", where="score < 1", max_reject_fraction=1.0)
    assert sorted(row["reason"] for row in accounts(cache)) == ["", "", "where"]


def test_columns_of_tables_are_keys(tmp_path):
    pq.write_table(
        pa.table({"image": [png(1)], "caption": ["a"], "width": [512]}), tmp_path / "a.parquet"
    )
    line = refused(tmp_path, "--where", "widht >= 512", shards=[tmp_path / "a.parquet"])
    assert "did you mean width?" in line


@pytest.mark.parametrize(("value", "kept"), [("7", True), ("3", False), (7, True), ("x", True)])
def test_text_as_a_number(value, kept):
    assert Where("number(a) > 5").keeps({"a": value}) is kept
