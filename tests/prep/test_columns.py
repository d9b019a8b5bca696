"""The flags that say where pictures, captions and keys stand: heeded or refused, never ignored."""

import json

import pytest

from tests.support.sources import (
    accounts,
    encode,
    png,
    prep,
    refusal,
    units,
    write_folder,
    write_tar,
)

PNG = png(1)
GOOD = {"caption": "alt text", "recaption": "a good caption"}
NONE_THERE = "no caption in 'recaption' of its json"


def tar_of(path, *rows):
    files = [
        file
        for number, row in enumerate(rows)
        for file in ((f"{number}.png", PNG), (f"{number}.json", json.dumps(row).encode()))
    ]
    return write_tar(path, [*files, ("9.png", PNG), ("9.txt", b"a txt")])


def listed(path, kind):
    """A folder of two pictures with a column `recaption`, one cell of which is empty."""
    write_folder(path, range(2))
    rows = [{"file_name": f"{n:04d}.png", "text": "alt", "recaption": "good" * n} for n in range(2)]
    (path / "metadata.jsonl").unlink()
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    (path / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    return path


def told(cache):
    return {row["source_key"]: row["captions"] or row["reason"] for row in accounts(cache)}


def test_a_tars_captions_are_taken_from_the_key_that_is_named(tmp_path):
    tar = tar_of(tmp_path / "a.tar", GOOD, {"caption": "a"}, {**GOOD, "recaption": ["b", "c"]})
    cache = encode(tar, tmp_path / "cache")
    assert told(cache) == {"0": ["alt text"], "1": ["a"], "2": ["alt text"], "9": ["a txt"]}
    encode(tar, cache, caption_column="recaption")  # another flag reads the unit again
    assert told(cache) == {
        "0": ["a good caption"], "1": NONE_THERE, "2": ["b", "c"], "9": NONE_THERE
    }  # fmt: skip
    (before,) = units(cache).values()
    encode(tar, cache, caption_column="recaption")
    assert list(units(cache).values()) == [before]
    answer = prep("verify", "--cache", cache, "--reencode", 2)
    assert "encoded again: 2 samples" in answer.err


def test_a_key_that_no_row_has_is_one_line(tmp_path):
    words = ("--model", "tiny-sd", "--cache", tmp_path / "c", "--caption-column", "recaption")
    tar = tar_of(tmp_path / "a.tar", {"caption": "a"})
    line = refusal("encode", "--shards", tar, *words)
    assert "not one usable picture" in line
    assert NONE_THERE in line
    folder = write_folder(tmp_path / "folder", range(2))
    line = refusal("encode", "--shards", folder, *words)
    assert line == f"--caption-column 'recaption': {folder} has the columns file_name, text"
    assert not (tmp_path / "c" / "units").exists()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folders_captions_are_taken_from_the_column_that_is_named(tmp_path, kind):
    folder = listed(tmp_path / "folder", kind)
    cache = encode(folder, tmp_path / "cache", max_reject_fraction=1.0, caption_column="recaption")
    assert told(cache) == {"0000.png": "no caption", "0001.png": ["good"]}


@pytest.mark.parametrize(
    "flag",
    [
        ("--image-column", "image"), ("--key-column", "id"), ("--streaming",),
        ("--folder-units", 4), ("--dataset-config-name", "en"),
    ],
)  # fmt: skip
def test_a_flag_about_other_sources_is_refused(tmp_path, flag):
    tar = tar_of(tmp_path / "a.tar", GOOD)
    words = ("encode", "--model", "tiny-sd", "--cache", tmp_path / "c", *flag)
    line = refusal(*words, "--shards", tar)
    assert line.startswith(f"{flag[0]} is for ")
    assert line.endswith("; --shards has none")
    if flag[0] != "--folder-units":
        folder = write_folder(tmp_path / "folder", range(2))
        assert refusal(*words, "--shards", tar, folder) == line
    assert not (tmp_path / "c").exists()
