"""Odd members of tars and folders: accounted for to the last row."""

import os
import pickle
import shlex
import sys
import tarfile
from collections import Counter

import pytest
import zstandard

from prep.sources.find import SourceOptions, find_units
from shared.errors import UserError
from tests.support.sources import (
    accounts,
    captioned,
    encode,
    file_of,
    manifest,
    photo,
    png,
    samples,
    write_folder,
    write_rows,
    write_tar,
)
from tests.support.tars import member, special_tar

PNG = png(1, 16, 16)


def rows_of(source, **options):
    """`key -> row` of everything that a source holds."""
    units = find_units([str(source)], SourceOptions(pipes=True, **options))
    units = pickle.loads(pickle.dumps(units))  # as when they go to other processes
    return {row.key: row for unit in units for row in unit.rows()}


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "good.tar", captioned(range(3)))


def nasty_members():
    """Files by which a careless reader would be hurt, and what should become of each row."""
    png_file, text = b"\x89PNG no picture", b"a caption"
    sparse = member("sparse.png", b"\0" * 512, type=tarfile.GNUTYPE_SPARSE)
    links = [
        member("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("link.txt", text),
        member("hard.png", type=tarfile.LNKTYPE, linkname="good.png"),
        member("hard.txt", text),
    ]
    long = "folder/" * 60 + "é" * 60
    files = [
        member("folder", type=tarfile.DIRTYPE),
        member("good.png", PNG), member("good.txt", text),
        member("../../up.png", PNG), member("../../up.txt", text),
        member("/absolute.png", PNG), member("/absolute.txt", text),
        *links,
        member("device.png", type=tarfile.CHRTYPE), member("device.txt", text),
        member("fifo.png", type=tarfile.FIFOTYPE),
        sparse, member("sparse.txt", text),
        member("large.png", b"x" * 30_000), member("large.txt", text),
        member("large text.png", PNG), member("large text.txt", b"x" * 1_000_001),
        member(f"{long}.png", PNG), member(f"{long}.txt", text),
        member("caf\udce9.png", PNG), member("caf\udce9.txt", text),
        member("v1.2/dots.png", PNG), member("v1.2/dots.txt", text),
        member("UP.PNG", PNG), member("UP.TXT", text),
        member("again.png", PNG), member("again.txt", text),
        member("again.png", PNG), member("again.txt", text),
        member("damaged.png", png_file), member("damaged.txt", text),
        member("README", b"no part of a sample"), member("__MACOSX/._good.png", b"Mac"),
        member("alone.png", PNG), member("only.txt", text), member("empty.png"),
        member("empty.txt", text),
    ]  # fmt: skip
    expected = {
        "good": "", "../../up": "", "/absolute": "", "link": "no picture", "hard": "no picture",
        "device": "no picture", "sparse": "sparse file", "large": "larger than --max-image-bytes",
        "large text": "caption longer than 100,000 characters", long: "", "caf?": "",
        "v1.2/dots": "",
        "UP": "", "again": "", "damaged": "cannot be decoded", "alone": "no caption",
        "only": "no picture", "empty": "empty file",
    }  # fmt: skip
    return files, expected


# --- odd members --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("kind", ["tar", "tar.zst", "pipe"])
def test_a_nasty_tar_goes_through_to_the_end(tmp_path, form, kind):
    files, expected = nasty_members()
    tar = special_tar(tmp_path / "a.tar", *files, form=form)
    if kind == "tar.zst":
        (tmp_path / "a.tar.zst").write_bytes(zstandard.compress(tar.read_bytes()))
        tar = tmp_path / "a.tar.zst"
    shards = f"pipe:cat {shlex.quote(str(tar))}" if kind == "pipe" else tar
    cache = encode(shards, tmp_path / "c", max_reject_fraction=1.0, max_image_bytes=20_000)
    rows = accounts(cache)
    assert {row["source_key"]: row["reason"] for row in rows} == expected
    assert Counter(row["source_key"] for row in rows)["again"] == 2
    totals = manifest(cache)["totals"]
    assert len(rows) == totals["read"] == totals["written"] + sum(totals["rejected"].values())
    assert totals["written"] == sum(row["status"] == "written" for row in rows) == 9


def test_large_members_are_not_read_into_memory(tmp_path):
    """A member of 20 MB beside a limit of 1 MB: the reader's memory must not grow by it."""
    import tracemalloc

    large = special_tar(
        tmp_path / "a.tar", member("a.png", bytes(20_000_000)), *[member("b.png", PNG)]
    )
    tracemalloc.start()
    rows = rows_of(large, max_image_bytes=1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows["a"].problem == "larger than --max-image-bytes"
    assert peak < 8_000_000


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        (b'["a caption"]', ()), (b'"a caption"', ()), (b"NaN", ()), (b"null", ()), (b"7", ()),
        (b'{"caption": NaN, "text": "a"}', ("a",)), (b'{"caption": 7, "TEXT": "a"}', ("a",)),
        (b'{"caption": [], "text": ["", "a", 3, "b"]}', ("a", "b")),
        (b'{"caption": {"en": "a"}, "prompt": "p"}', ("p",)),
        ('{"caption": "é"}'.encode("utf-16"), ("é",)),
        (b'\xef\xbb\xbf{"caption": "a"}', ("a",)), (b'{"a":' * 90_000, ()),
        (b'{"n": ' + b"9" * 9000 + b', "caption": "a"}', ()),
        # img2dataset, CC12M and LAION as they come
        (b'{"caption": "a", "url": "u", "key": "0", "status": "success", "error_message": null,'
         b' "width": 8, "height": 8, "original_width": 9, "original_height": 9, "exif": "{}",'
         b' "sha256": "0"}', ("a",)),
        (b'{"url": "u", "caption": "a", "width": null}', ("a",)),
        (b'{"URL": "u", "TEXT": "a", "WIDTH": 8, "HEIGHT": 8, "similarity": 0.3,'
         b' "punsafe": 0.1, "pwatermark": NaN, "AESTHETIC_SCORE": 6.1, "hash": -1}', ("a",)),
    ],
)  # fmt: skip
def test_json_of_any_kind(tmp_path, content, captions):
    row = rows_of(write_tar(tmp_path / "a.tar", [("a.png", PNG), ("a.json", content)]))["a"]
    assert row.captions == captions
    assert row.problem == ("" if captions else "no caption")


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"x" * 100_000, "x" * 100_000),
        (b"\xef\xbb\xbfa star", "a star"), (b"a\0b", "a\0b"),
    ],
)  # fmt: skip
def test_texts_of_any_kind(tmp_path, content, caption):
    tar = write_tar(tmp_path / "a.tar", [("a.png", PNG), ("a.txt", content)])
    assert rows_of(tar)["a"].captions == (caption,)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are always UTF-8")
def test_a_tar_whose_own_name_is_not_utf8(tmp_path):
    for name in (b"caf\xe9.tar", b"caf\xe8.tar"):
        os.rename(
            write_tar(tmp_path / "a.tar", [("a.png", png(2)), ("a.txt", b"a")]),
            os.path.join(os.fsencode(tmp_path), name),
        )
    cache = encode(f"{tmp_path}/*.tar", tmp_path / "cache")
    assert manifest(cache)["totals"]["written"] == 2
    assert len({sample.key for sample in samples(cache).values()}) == 1  # `a`, the last of two
    assert len({row["key"] for row in accounts(cache)}) == 2


def test_very_long_names_of_sources(tmp_path):
    tar = write_tar(tmp_path / ("é" * 120 + ".tar"), [("a.png", png(2)), ("a.txt", b"a")])
    assert manifest(encode(tar, tmp_path / "cache"))["totals"]["written"] == 1


# --- folders ------------------------------------------------------------------------------------


def test_a_nasty_folder_goes_through_to_the_end(tmp_path):
    folder = write_folder(tmp_path / "folder", range(3))
    (folder / "large.png").write_bytes(png(9) + bytes(100_000))
    (folder / "cut.png").write_bytes(png(9)[:200])
    (folder / "empty.png").touch()
    (folder / "grey.jpg").write_bytes(file_of(photo(4).convert("L"), "JPEG"))
    (tmp_path / "outside.png").write_bytes(PNG)
    (folder / "leads out.png").symlink_to(tmp_path / "outside.png")
    expected = {
        "0000.png": "", "0001.png": "no caption", "0002.png": "where", "grey.jpg": "",
        "large.png": "larger than --max-image-bytes", "cut.png": "cannot be decoded",
        "empty.png": "empty file", "leads out.png": "",
        "gone.png": "file missing",
    }  # fmt: skip
    rows = [{"file_name": name, "text": "x" * 100_000} for name in expected]
    rows[1]["text"] = ["", None]
    rows[2]["similarity"] = 0.1
    rows[3]["similarity"] = float("nan")
    write_rows(folder, rows)
    flags = {"max_reject_fraction": 1.0, "max_image_bytes": 50_000, "where": "similarity > 0.3"}
    cache = encode(folder, tmp_path / "cache", **flags)
    assert {row["source_key"]: row["reason"] for row in accounts(cache)} == expected
    totals = manifest(cache)["totals"]
    assert (totals["read"], totals["written"]) == (9, 3)


def test_numbers_of_a_csv_are_numbers_to_where(tmp_path):
    folder = write_folder(tmp_path / "folder", range(3))
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text(
        "file_name,text,similarity\n0000.png,0.5,0.1\n0001.png,b,0.4\n0002.png,c,\n"
    )
    found = {row.key: (row.captions, row.metadata.get("similarity")) for row in
             find_units([str(folder)])[0].rows()}  # fmt: skip
    assert found == {"0000.png": (("0.5",), 0.1), "0001.png": (("b",), 0.4),
                     "0002.png": (("c",), None)}  # fmt: skip


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_that_no_parser_takes(tmp_path, name):
    folder = write_folder(tmp_path / "folder", range(1))
    (folder / "metadata.jsonl").unlink()
    hostile = {
        "metadata.jsonl": "[" * 100_000,
        "metadata.csv": "file_name,text\na," + "x" * 200_000,
    }
    (folder / name).write_text(hostile[name])
    with pytest.raises(UserError, match=name):
        find_units([str(folder)])
