"""Tars from files, pipes and compressed streams: read strictly, accounted for to the last row."""

import gzip
import io
import json
import os
import pickle
import shlex
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import zstandard

from prep.sources.find import SourceError, SourceOptions, estimate_rows, find_units
from shared.errors import UserError
from tests.support.sources import (
    accounts,
    captioned,
    encode,
    file_of,
    manifest,
    photo,
    png,
    prep,
    refusal,
    samples,
    write_folder,
    write_rows,
    write_tar,
)

PNG = png(1, 16, 16)
TYPED = SourceOptions(pipes=True)  # as if on the command line


def rows_of(source, **options):
    """`key -> row` of everything that a source holds."""
    units = find_units([str(source)], SourceOptions(pipes=True, **options))
    units = pickle.loads(pickle.dumps(units))  # as when they go to other processes
    return {row.key: row for unit in units for row in unit.rows()}


def damage(source, **options):
    """The line with which reading a source ends."""
    with pytest.raises(SourceError) as caught:
        rows_of(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def special_tar(path, *members, form=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "good.tar", captioned(range(3)))


def compressed(kind, data):
    return zstandard.compress(data) if kind == "zst" else gzip.compress(data)


# --- compression --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tar.zst", "a.tar.gz", "a.tgz", "misnamed.tar"])
def test_compressed_tars_hold_the_same_rows(tar, tmp_path, name):
    packed = tmp_path / name
    packed.write_bytes(compressed(name.rpartition(".")[2], tar.read_bytes()))
    assert rows_of(packed) == rows_of(tar)
    (unit,) = find_units([str(packed)])
    assert unit.name.startswith(("a-", "misnamed-"))


def test_zstd_frames_in_a_row_are_one_stream(tar, tmp_path):
    data = tar.read_bytes()  # as pzstd and zstd -T0 write them
    frames = [zstandard.compress(data[i : i + 5000]) for i in range(0, len(data), 5000)]
    (tmp_path / "a.tar.zst").write_bytes(b"".join(frames))
    assert rows_of(tmp_path / "a.tar.zst") == rows_of(tar)


@pytest.mark.parametrize("kind", ["zst", "gz"])
@pytest.mark.parametrize("how", ["cut short", "cut before packing", "damaged"])
def test_damaged_compressed_tars(tar, tmp_path, kind, how):
    data = tar.read_bytes()
    packed = bytearray(compressed(kind, data[:9000] if how == "cut before packing" else data))
    if how == "cut short":
        del packed[len(packed) // 2 :]
    elif how == "damaged":
        packed[len(packed) // 2 :] = os.urandom(len(packed) - len(packed) // 2)
    (tmp_path / f"a.tar.{kind}").write_bytes(packed)
    line = damage(tmp_path / f"a.tar.{kind}")
    assert f"a.tar.{kind} is not a whole tar" in line
    assert "download it again" in line


# --- strictness ---------------------------------------------------------------------------------


def test_every_cut_is_noticed(tar, tmp_path):
    whole = tar.read_bytes()
    with tarfile.open(tar) as opened:
        last = opened.getmembers()[-1]
    end = last.offset_data + 512 * -(-last.size // 512)  # of the last file; then come zeros
    steps = sorted({*range(1, end, 1777), *range(512, end, 4096), last.offset + 100, end - 1, end})
    for cut in steps:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        assert "cut.tar is not a whole tar" in damage(tmp_path / "cut.tar"), cut
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])  # one block of zeros is an end
    assert len(rows_of(tmp_path / "cut.tar")) == 3


def test_garbage_between_files_is_noticed(tar, tmp_path):
    whole = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        third = opened.getmembers()[2]
    whole[third.offset : third.offset + 512] = b"\xaa" * 512
    (tmp_path / "a.tar").write_bytes(whole)
    assert f"at byte {third.offset}" in damage(tmp_path / "a.tar")


def test_tars_put_behind_each_other_are_not_half_read(tar, tmp_path):
    (tmp_path / "two.tar").write_bytes(tar.read_bytes() * 2)
    assert "several tars in one" in damage(tmp_path / "two.tar")


def test_a_tar_that_vanishes(tar):
    (unit,) = find_units([str(tar)])
    tar.unlink()
    with pytest.raises(SourceError, match=r"good\.tar"):
        list(unit.rows())


def test_sizes_that_cannot_be(tmp_path):
    header = bytearray(special_tar(tmp_path / "a.tar", member("a.png", PNG)).read_bytes())
    for size in (b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0"):  # negative, huge, 8 GB
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header[:512])
        (tmp_path / "b.tar").write_bytes(header)
        assert "b.tar is not a whole tar" in damage(tmp_path / "b.tar")
    long = special_tar(tmp_path / "c.tar", member("x" * 3_000_000 + ".png", PNG))
    assert "a header claims" in damage(long)


# --- odd members --------------------------------------------------------------------------------


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


# --- pipes --------------------------------------------------------------------------------------


def test_a_pipe_is_read_like_the_file(tar, tmp_path):
    assert rows_of(f"pipe:cat {tar}") == rows_of(tar)
    assert rows_of(f"pipe:gzip -c {tar} | cat") == rows_of(tar)


def test_braces_of_a_pipe(tar, tmp_path):
    write_tar(tmp_path / "b0.tar", captioned([7]))
    write_tar(tmp_path / "b1.tar", captioned([8]))
    units = find_units([f"pipe:cat {tmp_path}/b{{0..1}}.tar"], TYPED)
    assert {unit.source for unit in units} == {f"pipe:cat {tmp_path}/b{n}.tar" for n in (0, 1)}
    assert rows_of(rf"pipe:printf '%s\n' {tar} | xargs cat") == rows_of(tar)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("cat {}; exit 3", "exit status 3"),
        ("head -c 5000 {}; exit 3", "exit status 3"),
        ("head -c 5000 {}", "not a whole tar"),
        ("exit 3", "exit status 3"),
        ("true", "empty"),
        ("no-such-command", "exit status 127"),
        ("cat {}; kill -9 $$", "signal 9"),
        ("cat {} {}", "several tars in one"),
        ("echo '<html>404</html>'", "not a whole tar"),
    ],
)
def test_a_failing_command_is_never_a_silent_end(tar, command, told):
    line = damage("pipe:" + command.replace("{}", str(tar)))
    assert told in line
    assert "by hand" in line


def test_a_pipe_that_nobody_reads_to_the_end_is_ended(tmp_path):
    tar = write_tar(tmp_path / "a.tar", captioned(range(20)))
    marker = tmp_path / "pid"
    command = f"pipe:echo $$ > {marker}; cat {tar}; sleep 100"
    (unit,) = find_units([command], TYPED)
    rows = unit.rows()
    next(rows)
    rows.close()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{marker.read_text().strip()}").exists():
        assert time.monotonic() < deadline


def test_pipes_run_only_where_the_user_typed_them(tar, tmp_path):
    marker = tmp_path / "ran"
    command = f"pipe:touch {marker}; cat {tar}"
    (tmp_path / "run.toml").write_text(f"shards = [{json.dumps(command)}]\n")
    words = ["--model", "tiny-sd", "--cache", tmp_path / "c"]
    line = refusal("encode", "--config", tmp_path / "run.toml", *words)
    assert "run.toml: shards" in line
    assert "command line" in line
    braces = "{" + command + ",x}"  # nor by way of braces
    (tmp_path / "run.toml").write_text(f"shards = [{json.dumps(braces)}]\n")
    assert "nothing matches" in refusal("encode", "--config", tmp_path / "run.toml", *words)
    with pytest.raises(UserError, match="command line"):
        find_units([command])  # what a cache's record says, for example
    assert not marker.exists()
    assert prep("encode", "--shards", command, *words, "--threads", 1).status == 0
    assert marker.exists()
    picture = tmp_path / "sheet.png"
    marker.unlink()
    assert prep("decode", "--cache", tmp_path / "c", "--output", picture).status == 0
    assert not marker.exists()


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


# --- estimates ----------------------------------------------------------------------------------


def test_rows_are_estimated_without_reading_everything(tar, tmp_path):
    (tmp_path / "b.tar.zst").write_bytes(zstandard.compress(tar.read_bytes()))
    folder = write_folder(tmp_path / "folder", range(5))
    shards = [str(tar), str(tmp_path / "b.tar.zst"), str(folder), f"pipe:cat {tar}"]
    units = find_units(shards, TYPED)
    rows = {unit.source: estimate_rows(units)[unit.name] for unit in units}
    assert [rows[shard] for shard in shards] == [3, 3, 5, 1024]


@pytest.mark.parametrize("kind", ["zst", "gz"])
@pytest.mark.parametrize("padding", [0, 200_000])
def test_rows_of_a_packed_tar_are_scaled_by_packed_bytes(tmp_path, kind, padding, monkeypatch):
    """Whether it packs well or not, and whether all of it is read for that or the beginning."""
    files = [(f"{n}.png", Random(n).randbytes(20_000) + bytes(padding)) for n in range(120)]
    packed = tmp_path / f"a.tar.{kind}"
    packed.write_bytes(compressed(kind, write_tar(tmp_path / "a.tar", files).read_bytes()))
    for most in (800_000, 1 << 30):
        monkeypatch.setattr("prep.sources.tars.tar.SAMPLE_BYTES", most)
        (unit,) = find_units([str(packed)])
        assert estimate_rows([unit])[unit.name] == pytest.approx(120, rel=0.25)
