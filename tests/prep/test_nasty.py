"""Everything nasty at once, through the real commands: to the end, and every row accounted for.

What becomes of each kind of picture in pixels is told in test_images.py; here it is whether
the run gets through, what it says of each row, and whether the cache is good afterwards.
"""

import csv
import gzip
import io
import json
import os
import sys
import tarfile
import threading
from collections import Counter

import pyarrow.parquet as pq
import pytest
import webdataset
import zstandard

from prep.sources.tars.tar_rows import DOTTED
from tests.prep.test_remote import Server
from tests.support.pictures import bad_pictures, good_pictures
from tests.support.sources import (
    accounts,
    captioned,
    encode,
    manifest,
    png,
    prep,
    refusal,
    tree,
    units,
    write_tar,
)

CAPTION = b"a caption"
LARGE = "larger than --max-image-bytes"
GOOD, BAD = good_pictures(), bad_pictures()
PNG = png(1, 16, 16)
FLAGS = ("--model", "tiny-sd", "--threads", 1, "--latents", "mean", "--max-reject-fraction", 1.0)

NOT_UTF8 = "its txt is not UTF-8; save as UTF-8, or say --caption-encoding cp1252 or what it is"

# What a NAME.txt holds, and the reason for which its row is rejected.
TEXTS = {
    "long": (b"word " * 20_000, ""), "latin-1": ("caf\xe9".encode("latin-1"), NOT_UTF8),
    "utf-16": ("a star".encode("utf-16"), ""), "bytes": (bytes(range(256)), NOT_UTF8),
    "nul": (b"a\0b", ""), "only nul": (b"\0", "no caption"), "empty": (b"", "no caption"),
    "blank": (b" \r\n\t ", "no caption"), "mark": (b"\xef\xbb\xbf", "no caption"),
    "right to left": ("\u202eabc\u202c \u05d0\u05d1".encode(), ""),
    "control": (b"\x1b[31mred\x1b[0m\x07\x08\r\n", ""), "emoji": ("👩‍👩‍👧‍👦🏳️‍🌈".encode(), ""),
    "combining": (("a" + "\u0301" * 5000).encode(), ""),
    "html": (b"<img src=x onerror=alert(1)></script>", ""), "special": (b"<|endoftext|>", ""),
    "one word": (b"x" * 100_000, ""), "surrogates": (b"\xed\xa0\x80", NOT_UTF8),
}  # fmt: skip

# What "caption" is in a json.
VALUES = {
    "null": (None, "no caption"), "number": (7, "no caption"), "true": (True, "no caption"),
    "object": ({"en": "a"}, "no caption"), "list": (["", "a star", 3, None], ""),
    "no list": ([], "no caption"), "lists": ([["a"]], "no caption"),
    "surrogate": ("a\ud800b", ""), "nan": (float("nan"), "no caption"),
    "text of nul": ("\0", "no caption"), "many": ([f"caption {n}" for n in range(3000)], ""),
    "long text": ("x" * 100_000, ""), "huge number": (10**5000, "no caption"),
}  # fmt: skip

# Files that should be json.
JSONS = {
    "cut": b'{"caption": "a st', "array": b'["a star"]', "string": b'"a star"', "no json": b"",
    "deep": b"[" * 10_000 + b"]" * 10_000, "deep object": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "bytes of json": bytes(range(256)), "other keys": b'{"title": "a star"}',
}  # fmt: skip
DEEP_ENOUGH = b'{"caption": "a star", "deep": ' + b"[" * 400 + b"]" * 400 + b"}"

Expected = list[tuple[str, str]]


def pictures_and_texts(folder="", ending=""):
    """Files `(name, content)` that a folder and a tar can hold, and what becomes of each row."""
    files, expected = [], []

    def add(name, picture, text, reason):
        files.extend([(f"{folder}{name}.png", picture), (f"{folder}{name}.txt", text)])
        expected.append((f"{folder}{name}{ending}", reason))

    for name, content in GOOD.items():
        add(f"good {name}", content, CAPTION, "")
    for name, (content, reason) in BAD.items():
        add(f"bad {name}", content, CAPTION, reason)
    for name, (text, reason) in TEXTS.items():
        add(f"text {name}", PNG, text, reason)
    add("large", PNG + bytes(2_000_000), CAPTION, LARGE)
    return files, expected


def jsons():
    """Rows of a tar whose captions are in a json."""
    files, expected = [], []
    for name, (value, reason) in VALUES.items():
        text = "9" * 9000 if name == "huge number" else json.dumps(value)
        files += [
            (f"json {name}.png", PNG),
            (f"json {name}.json", b'{"caption": %b}' % text.encode()),
        ]
        expected.append((f"json {name}", reason))
    for name, content in JSONS.items():
        files += [(f"json {name}.png", PNG), (f"json {name}.json", content)]
        files += [
            (f"both {name}.png", PNG),
            (f"both {name}.json", content),
            (f"both {name}.txt", b"a"),
        ]
        reason = NOT_UTF8.replace("txt", "json") if name == "bytes of json" else "no caption"
        expected += [(f"json {name}", reason), (f"both {name}", "")]
    files += [("json deep enough.png", PNG), ("json deep enough.json", DEEP_ENOUGH)]
    return files, [*expected, ("json deep enough", "")]


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def names():
    """Rows whose names, kinds or headers would hurt a careless reader, as `(info, content)`."""
    good = [
        "../../up", "/absolute/path", "..", "a/../../b", "-rf", "--cache=x", "*", "{a,b}", "$(ls)",
        "C:\\windows\\system32", "line\nfeed", "carriage\rreturn", "tab\there", "bell\x07\x1b[31m",
        "emoji 👩‍👩‍👧‍👦", "caf\udce9", "a/b/c/d", "v1.2/dots", "x" * 240, "folder/" * 60 + "é" * 60,
        "e\u0301", "\u202egnp", "CON", "nul", " ", "a'\"b", "<b>", "0", "%00", "&amp;",
    ]  # fmt: skip
    files, expected = [], []
    for name in good:
        files += [member(f"{name}.png", PNG), member(f"{name}.txt", CAPTION)]
        if not name.startswith(".."):
            expected.append((name.encode("utf-8", "replace").decode(), ""))
    expected.append(("../../up", ""))  # `..png` has no name before its first dot
    for name, fields, reason in (
        ("symlink", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "no picture"),
        ("hard link", {"type": tarfile.LNKTYPE, "linkname": "0.png"}, "no picture"),
        ("device", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, "no picture"),
        ("block device", {"type": tarfile.BLKTYPE}, "no picture"),
        ("fifo", {"type": tarfile.FIFOTYPE}, "no picture"),
        ("folder", {"type": tarfile.DIRTYPE}, "no picture"),
        ("unknown type", {"type": b"Z"}, "no picture"),
        ("old file", {"type": tarfile.AREGTYPE}, ""),
        ("contiguous", {"type": tarfile.CONTTYPE}, ""),
        ("times", {"mtime": 2**33, "mode": 0, "uid": 2**40, "uname": "é" * 12}, ""),
    ):
        empty = reason == "no picture"
        files += [
            member(f"{name}.png", b"" if empty else PNG, **fields),
            member(f"{name}.txt", CAPTION),
        ]
        expected.append((name, reason))
    sparse = member("sparse.png", bytes(512), type=tarfile.GNUTYPE_SPARSE)
    files += [
        sparse, member("sparse.txt", CAPTION), member("README", CAPTION),
        member(".hidden.png", PNG),
        member("__MACOSX/._0.png", b"Mac"),
        member("twice.png", PNG), member("twice.txt", b"a"),
        member("twice.png", PNG), member("twice.txt", b"b"), member("twice.png", PNG),
        member("dots.v1.png", PNG), member("dots.v1.txt", CAPTION), member("UP.PNG", PNG),
        member("UP.TXT", CAPTION), member("alone.png", PNG), member("only.txt", CAPTION),
        member("two.jpg", PNG), member("two.png", b"other"), member("two.txt", CAPTION),
        member("other.heic", PNG), member("other.txt", CAPTION),
    ]  # fmt: skip
    expected += [
        ("sparse", "sparse file"), ("twice", ""), ("twice", ""), ("twice", "no caption"),
        ("dots", DOTTED), ("UP", ""), ("alone", "no caption"), ("only", "no picture"),
        ("two", ""), ("other", ""),
    ]  # fmt: skip
    return files, expected


def nasty_tar(path, form=tarfile.GNU_FORMAT):
    """The tar, and what becomes of each of its rows."""
    files, expected = pictures_and_texts()
    more, expected_more = jsons()
    odd, expected_odd = names()
    with tarfile.open(path, "w", format=form) as tar:
        for info, content in [*(member(*file) for file in files + more), *odd]:
            if form == tarfile.PAX_FORMAT:
                info.pax_headers = {
                    "comment": "é" * 5000,
                    "SCHILY.xattr.user.x": "\0\1",
                    "ctime": "x",
                }
            tar.addfile(info, io.BytesIO(content))
    return expected + expected_more + expected_odd


def nasty_folder(path):
    """A folder with NAME.txt beside each picture."""
    path.mkdir()
    files, expected = pictures_and_texts(ending=".png")
    for name, content in files:
        (path / name).write_bytes(content)
    (path / "alone.png").write_bytes(PNG)
    (path / "sub.folder").mkdir()
    (path / ".hidden.png").write_bytes(PNG)
    (path / ".hidden.txt").write_bytes(CAPTION)
    for name in ("sub.folder/a.b", "-rf", "line\nfeed", "emoji 👩‍👩‍👧‍👦", "x" * 240):
        (path / f"{name}.PNG").write_bytes(PNG)
        (path / f"{name}.txt").write_bytes(CAPTION)
        expected.append((f"{name}.PNG", ""))
    if sys.platform != "darwin":  # its file names are always UTF-8
        for ending, content in ((b".png", PNG), (b".txt", CAPTION)):
            with open(os.fsencode(path) + b"/caf\xe9" + ending, "wb") as file:
                file.write(content)
        expected.append(("caf?.png", ""))
    for name in ("fifo", "a folder", "out", "loop", "nowhere"):
        (path / f"{name}.txt").write_bytes(CAPTION)
    os.mkfifo(path / "fifo.png")
    (path / "a folder.png").mkdir()
    (path / "out.png").symlink_to("/dev/zero")
    (path / "loop.png").symlink_to("loop.png")
    (path / "nowhere.png").symlink_to("gone.png")
    return [
        *expected, ("alone.png", "no caption"), ("fifo.png", "file missing"),
        ("a folder.png", "file missing"), ("out.png", "file missing"),
        ("loop.png", "file missing"), ("nowhere.png", "file missing"),
    ]  # fmt: skip


def listed_folder(path):
    """A folder with metadata.jsonl."""
    path.mkdir()
    rows, expected = [], []
    for name, (value, reason) in VALUES.items():
        if name != "huge number":
            (path / f"{name}.png").write_bytes(PNG)
            rows.append({"file_name": f"{name}.png", "text": value})
            expected.append((f"{name}.png", reason))
    (path.parent / "outside.png").write_bytes(PNG)
    for name, reason in {
        "../outside.png": "outside the folder", "/etc/passwd": "outside the folder",
        "": "file missing",
        "..": "outside the folder",
        ".": "file missing", "gone.png": "file missing",
        "nul\0.png": "file missing", "x" * 5000: "file missing", "sur\ud800.png": "file missing",
        "line\nfeed.png": "file missing", "null.png": "",
    }.items():  # fmt: skip
        rows.append(
            {"file_name": name, "text": "a caption", "similarity": "high", "x": {"y": [[]]}}
        )
        expected.append((name.encode("utf-8", "replace").decode(), reason))
    rows.append({"file_name": "null.png"})
    expected.append(("null.png", "no caption"))
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return expected


def csv_folder(path):
    """A folder with metadata.csv."""
    path.mkdir()
    texts = {"a": "one, two", "b": "line\nfeed", "c": "", "d": "x" * 100_000, "e": '"', "f": "é\0"}
    with (path / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "width"])
        for name, text in texts.items():
            (path / f"{name}.png").write_bytes(PNG)
            writer.writerow([f"{name}.png", text, "wide"])
    return [(f"{name}.png", "" if text else "no caption") for name, text in texts.items()]


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
        threading.Thread(target=server.serve_forever, daemon=True).start()
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
