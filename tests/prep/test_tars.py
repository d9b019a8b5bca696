"""Tars from files and compressed streams: read strictly, and their rows estimated."""

import gzip
import os
import pickle
import tarfile
from random import Random

import pytest
import zstandard

from prep.sources.find import SourceError, SourceOptions, estimate_rows, find_units
from tests.support.sources import (
    captioned,
    png,
    write_folder,
    write_tar,
)
from tests.support.tars import member, special_tar

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
