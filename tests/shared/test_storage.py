"""Files are whole or absent, whatever happens in between."""

import errno
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.storage import files, temporary


@pytest.fixture
def place(tmp_path):
    """A file that exists, and the folder where its successors are made."""
    path = tmp_path / "kept" / "file.json"
    path.parent.mkdir()
    path.write_bytes(b"old")
    return path, tmp_path / "tmp"


def test_publish_replaces_and_returns_the_hash(place):
    path, tmp = place
    digest = files.publish([b"new ", b"content"], path, tmp)
    assert path.read_bytes() == b"new content"
    assert digest == hashlib.sha256(b"new content").hexdigest() == files.file_sha256(path)
    assert list(tmp.iterdir()) == []
    files.publish([b"x"], path.parent / "deeper" / "file", tmp)  # folders are made
    assert (path.parent / "deeper" / "file").read_bytes() == b"x"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "bad disk")])
def test_a_crash_before_the_rename_leaves_the_old_content(place, monkeypatch, call, error):
    path, tmp = place

    def crash(*_):
        raise error

    monkeypatch.setattr(os, call, crash)
    with pytest.raises((KeyboardInterrupt, OSError)):
        files.publish([b"new"], path, tmp)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_source_that_fails_half_way_leaves_nothing(place):
    path, tmp = place

    def chunks():
        yield b"half"
        raise RuntimeError("the other half is missing")

    with pytest.raises(RuntimeError):
        files.publish(chunks(), path, tmp)
    assert path.read_bytes() == b"old"
    assert list(tmp.iterdir()) == []


def test_content_is_on_disk_before_it_gets_its_name(place, monkeypatch):
    """fsync of the file, then the rename, then fsync of the folder."""
    path, tmp = place
    events = []

    def watch(name):
        real = getattr(os, name)

        def call(*args):
            target = args[0]
            if isinstance(target, int):
                target = os.readlink(f"/proc/self/fd/{target}")
            events.append((name, os.path.isdir(target)))
            return real(*args)

        monkeypatch.setattr(os, name, call)

    for name in ("write", "fsync", "replace"):
        watch(name)
    files.publish([b"new"], path, tmp)
    assert events == [("write", False), ("fsync", False), ("replace", False), ("fsync", True)]


def test_a_killed_writer_leaves_the_old_content(place):
    """The process dies between writing and renaming."""
    path, tmp = place
    script = (
        "import os, signal, sys, pathlib\n"
        "from shared.storage import files\n"
        "files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.publish([b'new'], pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
    )
    root = str(Path(files.__file__).parents[2])
    command = [sys.executable, "-c", script, str(path), str(tmp)]
    answer = subprocess.run(command, env={**os.environ, "PYTHONPATH": root})
    assert answer.returncode == -9
    assert path.read_bytes() == b"old"
    (stray,) = tmp.iterdir()
    temporary.sweep(tmp)  # the next run's first act
    assert not stray.exists()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "quota is used up; free some space"),
        (errno.EROFS, "read-only; choose another folder"),
        (errno.EACCES, "permission denied; choose a folder you may write to"),
    ],
)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_the_systems_refusals_are_one_line(place, monkeypatch, number, remedy, call):
    path, tmp = place

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match=remedy) as error:
        files.publish([b"new"], path, tmp)
    assert str(path.parent if call == "replace" else tmp) in str(error.value)  # which disk
    assert "\n" not in str(error.value)
    assert path.read_bytes() == b"old"


def test_a_folder_in_the_way_is_one_line_and_leaves_no_stray(tmp_path):
    (tmp_path / "picture.png").mkdir()
    with pytest.raises(UserError, match=r"picture\.png"):
        files.publish([b"new"], tmp_path / "picture.png", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        files.publish([b"x"], tmp_path / "file" / "a", tmp_path / "file" / "tmp")


def test_short_writes_are_completed(place, monkeypatch):
    """The system may take fewer bytes than it was given."""
    path, tmp = place
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:7]))
    content = bytes(range(256)) * 5
    assert files.publish([content], path, tmp) == hashlib.sha256(content).hexdigest()
    assert path.read_bytes() == content


# ---- One winner.


def contend(number: int, folder: str, start) -> bool:

    content = f"written by {number} ".encode() * 5000
    start.wait()
    return files.create_exclusively(content, Path(folder) / "identity", Path(folder) / "tmp")


def test_of_several_processes_one_creates_the_file(tmp_path):
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(6) as pool:
        start = manager.Barrier(6)
        for turn in range(5):
            folder = tmp_path / str(turn)
            jobs = [(number, str(folder), start) for number in range(6)]
            won = pool.starmap(contend, jobs, chunksize=1)
            assert won.count(True) == 1
            winner = f"written by {won.index(True)} ".encode() * 5000
            assert (folder / "identity").read_bytes() == winner
            assert list((folder / "tmp").iterdir()) == []


def test_create_exclusively_keeps_what_is_there(place):
    path, tmp = place
    assert files.create_exclusively(b"new", path, tmp) is False
    assert path.read_bytes() == b"old"
    assert files.create_exclusively(b"new", path.parent / "other", tmp) is True
    assert (path.parent / "other").read_bytes() == b"new"
    assert list(tmp.iterdir()) == []


# ---- Copying, JSON.


def test_copies_are_the_same_bytes(tmp_path):
    content = os.urandom(3_000_001)
    (tmp_path / "a").write_bytes(content)
    digest = files.copy_durably(tmp_path / "a", tmp_path / "x" / "b", tmp_path / "tmp")
    assert (tmp_path / "x" / "b").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()


def test_json_is_the_same_for_the_same_value(tmp_path):
    assert files.dump_json({"b": [1, 2.5], "a": "☃"}) == files.dump_json(
        dict(reversed({"b": [1, 2.5], "a": "☃"}.items()))
    )
    value = {"text": "naïve ☃", "number": 1e-8, "nothing": None}
    (tmp_path / "x.json").write_bytes(files.dump_json(value))
    assert (
        files.load_record(tmp_path / "x.json", dict, "restore it")
        == value
        == json.loads((tmp_path / "x.json").read_text())
    )


def test_json_that_is_missing_or_damaged_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"x\.json does not exist"):
        files.load_record(tmp_path / "x.json", dict, "restore it")
    for content in (b"{", b"\xff\xfe", b""):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.json is not valid JSON") as error:
            files.load_record(tmp_path / "x.json", dict, "restore it")
        assert "\n" not in str(error.value)
