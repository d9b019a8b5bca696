"""`prep pack` and `unpack`: there and back bit for bit."""

import hashlib
import shutil

import pytest
import zstandard

from tests.support.sources import (
    captioned,
    encode,
    png,
    prep,
    refusal,
    shards,
    tree,
    units,
    write_tar,
)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tidy")
    bad = [("bad\x1b[2J.png", b"no picture"), ("bad\x1b[2J.txt", b"x"), ("bare.png", png(1))]
    return [
        write_tar(folder / "a.tar", [*captioned(range(5)), *bad]),
        write_tar(folder / "b.tar", captioned(range(10, 14))),
    ]


@pytest.fixture(scope="module")
def clean(tars):
    return encode(tars, tars[0].parent / "cache")


@pytest.fixture
def cache(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "cache")


@pytest.fixture(scope="module")
def archived(clean, tmp_path_factory):
    archive = tmp_path_factory.mktemp("pack") / "archive"
    assert prep("pack", "--cache", clean, "--output", archive, "--threads", 1).status == 0
    return archive


@pytest.fixture
def archive(archived, tmp_path):
    return shutil.copytree(archived, tmp_path / "archive")


def test_there_and_back_bit_for_bit(clean, archived, tmp_path):
    back = tmp_path / "back"
    answer = prep("unpack", "--input", archived, "--cache", back)
    assert "9 samples in 2 shards" in answer.out
    assert tree(back) == tree(clean)
    for line in (archived / "SHA256SUMS").read_text().splitlines():  # as `sha256sum -c` reads it
        digest, name = line.split("  ", 1)
        assert hashlib.sha256((archived / name).read_bytes()).hexdigest() == digest
    shard = next((archived / "shards").iterdir())
    content = zstandard.ZstdDecompressor().stream_reader(shard.read_bytes()).read()
    assert content == (clean / "shards" / shard.name.removesuffix(".zst")).read_bytes()


def test_packing_again_writes_only_what_is_missing_or_wrong(clean, archive):
    wanted, (first, second) = tree(archive), sorted((archive / "shards").iterdir())
    first.write_bytes(first.read_bytes()[:-9])
    (archive / "SHA256SUMS").unlink()
    (archive / "manifest.json").unlink()
    stamp = second.stat().st_mtime_ns
    assert prep("pack", "--cache", clean, "--output", archive, "--threads", 1).status == 0
    assert tree(archive) == wanted
    assert second.stat().st_mtime_ns == stamp


def test_unpacking_again_writes_only_what_is_missing_or_wrong(clean, archived, tmp_path):
    back = shutil.copytree(clean, tmp_path / "back")
    first, second = shards(back)
    content = bytearray(first.read_bytes())
    content[3000] ^= 1
    first.write_bytes(content)
    stamp = second.stat().st_mtime_ns
    assert "1 shard was there" in prep("unpack", "--input", archived, "--cache", back).out
    assert tree(back) == tree(clean)
    assert second.stat().st_mtime_ns == stamp


def test_a_damaged_archive_is_one_line_and_no_cache(archive, tmp_path):
    shard = sorted((archive / "shards").iterdir())[1]
    whole = shard.read_bytes()
    for content in (whole[:-20], whole[:99] + bytes(9) + whole[108:], b"", whole[:-4] + b"abcd"):
        shard.write_bytes(content)
        line = refusal("unpack", "--input", archive, "--cache", tmp_path / "back")
        assert str(shard) in line
        assert "copy it again" in line
        assert not (tmp_path / "back" / "manifest.json").exists()
    shard.write_bytes(whole)
    assert prep("unpack", "--input", archive, "--cache", tmp_path / "back").status == 0


def test_an_archive_whose_shard_is_another_one(archive, tmp_path):
    """Right to zstd and to SHA256SUMS, but not what the records say."""
    shard = next((archive / "shards").iterdir())
    shard.write_bytes(zstandard.ZstdCompressor().compress(bytes(10**8)))
    line = refusal("unpack", "--input", archive, "--cache", tmp_path / "back")
    assert "is damaged" in line
    assert sum(p.stat().st_size for p in (tmp_path / "back").rglob("*") if p.is_file()) < 10**6


@pytest.mark.parametrize("name", ["../evil", "/etc/evil.json", "units/../../evil.json", "x.sh"])
def test_names_that_lead_elsewhere_are_refused(archive, tmp_path, name):
    with (archive / "SHA256SUMS").open("a") as file:
        file.write(f"{hashlib.sha256(b'').hexdigest()}  {name}\n")
    line = refusal("unpack", "--input", archive, "--cache", tmp_path / "back")
    assert "is not of a `prep pack` archive" in line
    assert not (tmp_path / "back").exists()


def test_mistakes_of_pack_and_unpack(cache, archive, tmp_path, monkeypatch):
    back = tmp_path / "back"
    assert "--level" in refusal("pack", "--cache", cache, "--output", back, "--level", 99)
    assert "another folder" in refusal("pack", "--cache", cache, "--output", cache)
    (archive / "units" / "other-01234567.json").write_text("{}")
    assert "choose another --output" in refusal("pack", "--cache", cache, "--output", archive)
    (cache / "units" / "other-01234567.json").write_text("{}")
    assert "choose another --cache" in refusal("unpack", "--input", archive, "--cache", cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    assert "free some space" in refusal("unpack", "--input", archive, "--cache", back)
    (archive / "SHA256SUMS").unlink()
    assert "not a finished archive" in refusal("unpack", "--input", archive, "--cache", back)


def test_a_damaged_cache_is_not_packed(cache, tmp_path):
    shard = shards(cache)[0]
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)
    line = refusal("pack", "--cache", cache, "--output", tmp_path / "archive")
    assert shard.name in line
    assert "verify --repair" in line
    assert not (tmp_path / "archive" / "SHA256SUMS").exists()
    assert list((tmp_path / "archive").rglob("*.zst")) == []
    assert units(cache)
