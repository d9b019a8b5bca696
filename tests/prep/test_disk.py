"""A disk that is full, read-only or no folder: one line, and nothing is lost."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from unittest import mock

import pytest

from tests.support.sources import (
    captioned,
    encode,
    refusal,
    tree,
    write_tar,
)
from tests.support.sources import prep as run_prep


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


def test_a_cache_that_is_a_file(run, tar, tmp_path):
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "cache"):
        line = run(tar, cache=cache)
        assert str(tmp_path / "file") in line
        assert "is a file, not a folder" in line


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid"), reason="POSIX permissions")
def test_a_cache_that_may_not_be_written(run, tar, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    if os.geteuid():
        locked.chmod(0o555)
        line = run(tar, cache=locked / "cache")
    else:  # root may write anywhere, so the operating system's answer is put in its mouth
        real = os.mkdir

        def mkdir(path, *args, **options):
            if str(path).startswith(str(locked)):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return real(path, *args, **options)

        with mock.patch.object(os, "mkdir", mkdir):
            line = run(tar, cache=locked / "cache")
    assert str(locked) in line
    assert "choose a folder you may write to" in line


Usage = namedtuple("Usage", "total used free")


def with_free(free):
    return mock.patch.object(shutil, "disk_usage", return_value=Usage(10**12, 0, free))


def test_too_little_disk_space(run, tar, tmp_path):
    need = sum(p.stat().st_size for p in (encode(tar, tmp_path / "c") / "shards").iterdir())
    with with_free(need // 2):
        line = run(tar, "--latents", "mean")
    assert str(tmp_path / "cache") in line
    assert " are free; " in line
    assert "free some space or choose another --cache" in line
    assert not (tmp_path / "cache").exists()
    with with_free(4 * need):
        encode(tar, tmp_path / "cache")


def test_the_space_that_one_unit_takes_while_it_is_written_counts(run, tar, tmp_path):
    """Until it is published, a unit is on the disk twice: as encoded, and sorted."""
    need = sum(p.stat().st_size for p in (encode(tar, tmp_path / "c") / "shards").iterdir())
    with with_free(int(1.3 * need)):
        assert " are free; " in run(tar, "--latents", "mean")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting a small tmpfs takes root on Linux")
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no tmpfs may be mounted here")
    yield folder
    # Lazily: what safetensors mapped may not have been collected yet.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize(
    "room",
    [
        0,
        pytest.param(8, marks=pytest.mark.slow),
        40,
        pytest.param(120, marks=pytest.mark.slow),
        220,
    ],
)
def test_a_disk_that_fills_up_and_is_freed(run, small_disk, tmp_path, room):
    """`room` kB are left: too few for the identity, ..., for the second unit's shard."""
    tars = [
        write_tar(tmp_path / f"{name}.tar", captioned(range(first, first + 12)))
        for name, first in (("a", 0), ("b", 20))
    ]
    wanted = tree(encode(tars, tmp_path / "wanted"))
    cache, ballast = small_disk / "cache", small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(free - room * 1024))
    with with_free(10**9):  # someone else fills the disk after the check
        line = run(tars, "--latents", "mean", cache=cache)
    assert str(cache) in line
    assert "the disk is full" in line
    assert "run the same command again" in line
    assert not list(cache.glob("tmp/*"))
    ballast.unlink()
    assert tree(encode(tars, cache)) == wanted


COMMANDS = {
    "finish": ["finish", "--cache", "CACHE", "--no-report"],
    "report": ["report", "--cache", "CACHE"],
    "embed": ["embed", "--cache", "CACHE", "--prompts", "a kite"],
    "pack": ["pack", "--cache", "CACHE", "--output", "DISK/archive", "--threads", "1"],
    "unpack": ["unpack", "--input", "ARCHIVE", "--cache", "DISK/restored"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("room", [0, 8])
def test_a_disk_that_is_full_for_the_other_commands(small_disk, tmp_path, command, room):
    tar = write_tar(tmp_path / "a.tar", captioned(range(4)))
    cache, archive = encode(tar, small_disk / "cache"), tmp_path / "archive"
    shutil.copytree(cache, tmp_path / "cache")
    assert run_prep("pack", "--cache", cache, "--output", archive).status == 0
    places = {"CACHE": str(cache), "DISK": str(small_disk), "ARCHIVE": str(archive)}
    words = COMMANDS[command]
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    before = tree(cache)
    ballast = small_disk / "ballast"
    pages = shutil.disk_usage(small_disk).free // 4096
    ballast.write_bytes(bytes(4096 * pages - room * 1024))
    with with_free(10**9):  # someone else fills the disk after the check
        answer = run_prep(*words)
    # What fits in 8 kB may succeed: the manifest and the prompts do.
    if room == 0 or answer.status:
        assert answer.status == 1
        (line,) = answer.errors
        assert str(small_disk) in line
        assert "the disk is full; free some space and run the same command again" in line
        assert tree(cache) == before
        assert not [p for p in small_disk.rglob("*") if p.parent.name == "tmp"]
    ballast.unlink()
    assert run_prep(*words).status == 0
    if command == "unpack":
        assert tree(small_disk / "restored") == before
    elif command == "pack":
        assert tree(small_disk / "archive") == tree(archive)
    elif command == "embed":
        run_prep("embed", "--cache", tmp_path / "cache", "--prompts", "a kite")
        assert tree(cache) == tree(tmp_path / "cache")
    else:
        assert tree(cache) == before
