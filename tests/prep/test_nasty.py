"""Everything nasty at once, through the real commands: to the end, and every row accounted for.

What becomes of each kind of picture in pixels is told in test_images.py; here it is whether
the run gets through, what it says of each row, and whether the cache is good afterwards.
"""

import gzip
import io
import os
import tarfile
from collections import Counter

import pyarrow.parquet as pq
import pytest
import webdataset
import zstandard

from tests.support.nasty import PNG, csv_folder, listed_folder, member, nasty_folder, nasty_tar
from tests.support.sources import (
    accounts,
    captioned,
    encode,
    manifest,
    prep,
    refusal,
    tree,
    units,
    write_tar,
)
from tests.support.web import Server, serve

FLAGS = ("--model", "tiny-sd", "--threads", 1, "--latents", "mean", "--max-reject-fraction", 1.0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Every source with the rows it must give: `path -> [(key, reason)]`."""
    folder = tmp_path_factory.mktemp("nasty")
    found = {
        folder / "gnu.tar": nasty_tar(folder / "gnu.tar"),
        folder / "folder": nasty_folder(folder / "folder"),
        folder / "listed": listed_folder(folder / "listed"),
        folder / "table": csv_folder(folder / "table"),
    }
    expected = nasty_tar(folder / "pax", tarfile.PAX_FORMAT)
    (folder / "pax.tar.zst").write_bytes(zstandard.compress((folder / "pax").read_bytes()))
    return found | {folder / "pax.tar.zst": expected}


@pytest.fixture(scope="module")
def nasty(sources, tmp_path_factory):
    """The cache that the real command makes of them."""
    cache = tmp_path_factory.mktemp("cache") / "cache"
    words = ["--cache", cache, *FLAGS, "--max-image-bytes", 1_000_000]
    answer = prep("encode", "--shards", *sources, *words)
    assert answer.status == 0, answer.err
    return cache


def test_every_row_ends_as_it_should(sources, nasty):
    keys = {row["key"] for row in accounts(nasty)}
    assert len(keys) == len(accounts(nasty)) == sum(map(len, sources.values()))
    for path, expected in sources.items():
        found = rows_of(nasty, path)
        assert Counter((row["source_key"], row["reason"]) for row in found) == Counter(expected)
        assert all((row["status"] == "written") == (row["reason"] == "") for row in found)


def rows_of(cache, source):
    tables = [u["samples"] for u in units(cache).values() if u["source"] == str(source)]
    return [row for table in tables for row in pq.read_table(cache / table).to_pylist()]


def test_read_is_written_and_rejected(sources, nasty):
    totals = manifest(nasty)["totals"]
    reasons = Counter(reason for rows in sources.values() for _, reason in rows)
    written = reasons.pop("")
    assert totals["read"] == totals["written"] + sum(totals["rejected"].values())
    assert totals["written"] == written
    assert totals["rejected"] == dict(reasons)
    for unit in units(nasty).values():
        assert unit["read"] == unit["written"] + sum(unit["rejected"].values())


def test_the_cache_is_good(nasty, tmp_path):
    answer = prep("verify", "--cache", nasty, "--reencode", 30)
    assert answer.status == 0, answer.err
    assert "no damage" in answer.out
    assert "encoded again: 30 samples" in answer.err
    assert prep("stats", "--cache", nasty).status == 0
    sheet = tmp_path / "sheet.png"
    assert prep("decode", "--cache", nasty, "--output", sheet, "--count", 40).status == 0


def test_stock_webdataset_decodes_it(nasty):
    urls = [str(nasty / row["file"]) for row in manifest(nasty)["shards"]]
    count = 0
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        assert sample["latents.npy"].shape[-2:] == (8, 8)
        assert sample["json"]["num_captions"] == 1
        count += 1
    assert count == manifest(nasty)["totals"]["written"]


def test_the_report_shows_it_safely(nasty):
    page = (nasty / "report.html").read_text("utf-8")
    assert "cannot be decoded" in page
    assert "onerror=alert(1)>" not in page
    assert not {"\x1b", "\u202e", "\0", "\x07"} & set(page)


def test_nothing_is_written_outside_the_cache(sources, nasty):
    around = {path.name for path in nasty.parent.iterdir()}
    assert around == {"cache"}
    folder = next(iter(sources)).parent
    made = {"gnu.tar", "pax", "pax.tar.zst", "folder", "listed", "table", "outside.png"}
    assert {path.name for path in folder.iterdir()} == made


def test_running_again_does_nothing(sources, nasty):
    before = tree(nasty)
    words = ["--cache", nasty, *FLAGS, "--max-image-bytes", 1_000_000, "--no-report"]
    answer = prep("encode", "--shards", *sources, *words)
    assert answer.status == 0
    assert "nothing to encode" in answer.err
    assert tree(nasty) == before


# --- damaged sources ----------------------------------------------------------------------------


def blocks(*members):
    """The bytes of a tar's members, without its end mark."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    return buffer.getvalue()[:end]


def pax(**keywords):
    """A PAX header, which stands before the member that it is about."""
    lines = b""
    for name, value in keywords.items():
        rest = f" {name.replace('_', '.')}={value}\n".encode()
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        lines += str(length).encode() + rest
    return blocks(member("pax", lines, type=tarfile.XHDTYPE))


def damaged(whole):
    """`file name -> content` of tars that are no good, by what is wrong with them."""
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        picture, text = tar.getmembers()[2:4]
    flipped = bytearray(whole)
    flipped[picture.offset + 130] ^= 4
    end, picture_first = bytes(1024), blocks(member("0.png", PNG))
    longname = blocks(member("x", b"x" * 200 + b"\0", type=tarfile.GNUTYPE_LONGNAME))
    sparse = {"GNU_sparse_major": 1, "GNU_sparse_minor": 0, "GNU_sparse_name": "a.png"}
    gz, zst = gzip.compress(whole), zstandard.compress(whole)
    return {
        "cut in data.tar": whole[: picture.offset_data + 100],
        "cut in a header.tar": whole[: picture.offset + 100],
        "cut in the text.tar": whole[: text.offset_data + 3],
        "cut between.tar": whole[: text.offset],
        "garbage.tar": whole[: picture.offset] + os.urandom(512) + whole[picture.offset :],
        "flipped.tar": bytes(flipped),
        "short.tar.zst": zst[:-2000], "short.tar.gz": gz[:-2000],
        "wrong sum.tar.gz": gz[:-8] + b"\0\0\0\0" + gz[-4:],
        "packed when cut.tar.zst": zstandard.compress(whole[:9000]),
        "empty.tar": bytes(10240), "empty.tar.zst": zstandard.compress(bytes(10240)),
        "folders.tar": blocks(*[member(name, type=tarfile.DIRTYPE) for name in "abc"]) + end,
        "nested headers.tar": longname * 3000 + picture_first + end,
        "odd sparse.tar": pax(**sparse) + blocks(member("s.png", b"no number" * 99)) + end,
        "odd map.tar": pax(GNU_sparse_map="1,two,3") + picture_first + end,
        "odd size.tar": pax(size="many") + picture_first + end,
        "negative.tar": pax(size=-5000) + picture_first + end,
        "html.tar": b"<!doctype html><title>404</title>" * 99,
        "line\nfeed\x1b.tar": whole[:5000],
    }  # fmt: skip


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("shared.storage.retry.FIRST_WAIT", 0.01)
    with Server() as server:
        serve(server)
        yield server
        server.shutdown()


def test_damaged_sources_cost_their_units_only(tmp_path, server):
    good = write_tar(tmp_path / "a.tar", captioned(range(4)))
    whole = write_tar(tmp_path / "whole", captioned(range(10, 14))).read_bytes()
    bad = damaged(whole)
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    server.files["/dies-midway.tar"] = whole
    server.faults = ["break off"] * 10_000
    url = f"{server.url}/dies-midway.tar"
    shards, cache = [good, *(tmp_path / name for name in bad), url], tmp_path / "cache"
    words = ["encode", "--shards", *shards, "--cache", cache, *FLAGS, "--no-report"]
    answer = prep(*words)
    assert answer.status == 1
    assert len(answer.errors) == 1
    assert f"and {len(bad)} more, listed above); the other 1 unit is committed" in answer.err
    skipped = [line for line in answer.err.splitlines() if "skipped: " in line]
    for name in bad:
        shown = name.encode("unicode_escape").decode()
        (line,) = [line for line in skipped if f"{tmp_path}/{shown} " in line]
        assert "not a whole tar" in line or "holds no files of samples" in line
        assert "download it again" in line
    (line,) = [line for line in skipped if url in line]
    assert "6 times); run the same command again" in line
    assert [unit["source"] for unit in units(cache).values()] == [str(good)]
    # Downloaded again they are taken in, and the bytes are those of an undisturbed run.
    (shard,) = (cache / "shards").iterdir()
    time = shard.stat().st_mtime_ns
    for name in bad:
        packed = {"zst": zstandard.compress, "gz": gzip.compress}
        (tmp_path / name).write_bytes(packed.get(name.rpartition(".")[2], bytes)(whole))
    server.faults = []
    encode(shards, cache, max_reject_fraction=1.0)
    assert shard.stat().st_mtime_ns == time
    assert manifest(cache)["totals"]["written"] == 4 * (len(bad) + 2)
    assert tree(cache) == tree(encode(shards, tmp_path / "wanted", max_reject_fraction=1.0))


@pytest.mark.parametrize("text", ["[" * 10_000, '{"a":' * 5000, '{"file_name": 3}', "null", "{"])
def test_metadata_that_cannot_be_read_is_one_line(tmp_path, text):
    (tmp_path / "line\nfeed").mkdir()
    (tmp_path / "line\nfeed" / "metadata.jsonl").write_text(text)
    shards = tmp_path / "line\nfeed"
    assert "line\\nfeed" in refusal("encode", "--shards", shards, "--cache", tmp_path / "c", *FLAGS)
    assert not (tmp_path / "c").exists()
