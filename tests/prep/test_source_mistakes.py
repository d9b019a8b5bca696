"""A mistake about sources is one line with its cause and its remedy, and exit status 1."""

import os
import subprocess
import sys
from unittest import mock

import pytest

import prep.sources.braces
from tests.support.sources import (
    ROOT,
    captioned,
    encode,
    manifest,
    refusal,
    units,
    write_folder,
    write_tar,
)


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "good.tar", captioned(range(6)))


@pytest.fixture
def run(tmp_path):
    """The line with which `prep encode` refuses; it must not leave a cache that looks begun."""

    def refused(shards, *flags, model="tiny-sd", cache=None):
        shards = [shards] if isinstance(shards, str | os.PathLike) else shards
        cache = cache or tmp_path / "cache"
        words = ["--model", model, "--cache", cache, "--threads", 1, *flags]
        return refusal("encode", "--shards", *shards, *words)

    return refused


@pytest.mark.slow
def test_the_real_command_says_it_in_one_line(tmp_path):
    words = ["encode", "--shards", "pictures/{00..03}.tar", "--model", "tiny-sd", "--cache", "c"]
    answer = subprocess.run(
        [sys.executable, "-m", "prep", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr == (
        "error: --shards: nothing matches 'pictures/00.tar' (pictures does not exist)\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_mistyped_paths(run, tmp_path, tar):
    line = run(tmp_path / "god.tar")
    assert str(tmp_path / "god.tar") in line
    assert "no such file" in line
    assert f"{tmp_path / 'nowhere'} does not exist" in run(tmp_path / "nowhere" / "a.tar")
    assert "*.tgz" in run(f"{tmp_path}/*.tgz")
    assert "good7.tar" in run(f"{tmp_path}/good{{,7}}.tar")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("pattern", ["a/{00..03.tar", "a/00..03}.tar", "a/{{1..2}.tar"])
def test_unbalanced_braces(run, tmp_path, pattern):
    line = run(tmp_path / pattern)
    assert pattern in line
    assert "braces" in line or "nothing matches" in line


def test_too_many_names(run, tmp_path):
    with mock.patch.object(prep.sources.braces, "MANY", 1000):
        assert "more than 1000 names" in run(f"{tmp_path}/{{0..99}}/{{0..99}}.tar")


def test_a_folder_without_captions(run, tmp_path):
    (tmp_path / "folder").mkdir()
    line = run(tmp_path / "folder")
    assert "metadata.jsonl" in line
    assert '{"file_name": "a.jpg", "text": "a caption"}' in line


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("metadata.jsonl", b'{"file_name": "0000.png", "text": "a"}\n{"file_name": ', "line 2"),
        ("metadata.jsonl", b'{"name": "0000.png", "text": "a"}\n', "file_name"),
        ("metadata.jsonl", b'"0000.png"\n', "file_name"),
        ("metadata.jsonl", b"\n", "no pictures"),
        ("metadata.jsonl", '{"file_name": "0000.png", "text": "é"}'.encode("latin-1"), "UTF-8"),
        ("metadata.csv", "file_name,text\n0000.png,é\n".encode("latin-1"), "UTF-8"),
        ("metadata.csv", b"file_name,text\n0000.png,a red, round star\n", "row 1"),
        ("metadata.csv", b"name,text\n0000.png,a star\n", "file_name"),
    ],
)
def test_damaged_metadata(run, tmp_path, name, content, named):
    folder = write_folder(tmp_path / "folder", range(1))
    (folder / "metadata.jsonl").unlink()
    (folder / name).write_bytes(content)
    line = run(folder)
    assert str(folder) in line
    assert named in line
    assert not (tmp_path / "cache").exists()


def test_empty_tars(run, tmp_path):
    (tmp_path / "zero.tar").touch()
    line = run(tmp_path / "zero.tar")
    assert "zero.tar is empty" in line
    assert "download it again" in line
    line = run(write_tar(tmp_path / "nothing.tar", []))
    assert "nothing.tar" in line
    assert "no files" in line


def test_a_file_that_is_no_tar(run, tmp_path):
    (tmp_path / "page.tar").write_text("<html>404 not found</html>" * 100)
    line = run(tmp_path / "page.tar")
    assert "page.tar is not a whole tar" in line
    assert "download it again" in line


def cuts(tar):
    """Sizes to which a tar may be cut short, by where that is in its second row's picture."""
    import tarfile

    with tarfile.open(tar) as file:
        info = file.getmembers()[2]
    return {
        "in the header": info.offset + 200,
        "in the data": info.offset_data + 700,
        "in the data at a block": info.offset_data + 1024,
        "before the end mark": info.offset,
        "between header and data": info.offset_data,
    }


CUTS = ("in the header", "in the data", "in the data at a block", "before the end mark",
        "between header and data")  # fmt: skip


@pytest.mark.parametrize("where", CUTS)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_truncated_tar_among_good_ones(run, tmp_path, where, place):
    good = [
        write_tar(tmp_path / f"{name}.tar", captioned(range(first, first + 3)))
        for name, first in (("b", 0), ("c", 10))
    ]
    bad = write_tar(tmp_path / ("a.tar" if place == "first" else "d.tar"), captioned(range(6)))
    whole = bad.read_bytes()
    bad.write_bytes(whole[: cuts(bad)[where]])
    line = run([*good, bad], "--latents", "mean")
    assert str(bad) in line
    assert "download it again" in line
    assert {unit["source"] for unit in units(tmp_path / "cache").values()} == set(map(str, good))
    # Downloaded again it is taken in, and the good ones are not done twice.
    bad.write_bytes(whole)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "shards").iterdir()}
    encode([*good, bad], tmp_path / "cache")
    assert all(path.stat().st_mtime_ns == time for path, time in stamps.items())
    assert manifest(tmp_path / "cache")["totals"]["written"] == 12


def test_a_truncated_tar_alone(run, tmp_path, tar):
    tar.write_bytes(tar.read_bytes()[: cuts(tar)["in the data"]])
    assert str(tar) in run(tar)
    assert units(tmp_path / "cache") == {}
