"""What the machine refuses ends in one line, and a mistake in the program in a traceback."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from shared.cache.layout import cache_layout
from shared.cache.units import Shard, UnitRecord
from shared.errors import UserError, exhausted, run_main
from shared.storage import retry, urls
from shared.storage.errors import is_mistake
from shared.storage.files import dump_json


def said(raised, capsys) -> str:
    def main():
        raise raised

    with pytest.raises(SystemExit) as end:
        run_main(main, "take less")
    captured = capsys.readouterr()
    assert end.value.code == 1
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EIO, "the disk fails"),
        (errno.ENAMETOOLONG, "the name is too long"),
        (errno.EMFILE, "too many files are open"),
        (errno.ESTALE, "stale handle"),
        (errno.EACCES, "permission denied"),
        (errno.ENOENT, "No such file"),
    ],
)
def test_what_the_system_refuses_is_one_line(number, remedy, capsys):
    assert remedy in said(OSError(number, os.strerror(number)), capsys)
    line = said(OSError(number, os.strerror(number), "/a/file"), capsys)
    assert "/a/file: " in line
    assert remedy in line


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((1,), np.dtype("f8")),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't "
                     "allocate memory: you tried to allocate 9 bytes. Error code 12"),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried to"),
    ],
)  # fmt: skip
def test_a_full_memory_is_one_line(error, capsys):
    assert said(error, capsys) == "error: the memory is full; take less\n"


def test_torch_runs_out_of_the_machines_memory(capsys):
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert exhausted(error.value) == "the memory is full"


def test_a_full_disk_behind_stdout_is_one_line():
    script = "from shared.errors import run_main; run_main(lambda: print('x' * 100))"
    with open("/dev/full", "w") as full:
        answer = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: what was to be written does not fit: the disk is full")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("stage", ["prep", "train", "infer"])
def test_ctrl_c_while_a_command_is_imported_ends_it_without_a_word(stage):
    script = f"""
import importlib.abc, os, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "{stage}.config":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.default_int_handler)
import {stage}.__main__
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert answer.returncode == -signal.SIGINT
    assert answer.stderr == ""


def test_names_that_are_not_utf8_are_printed_and_kept(tmp_path):
    odd = os.fsdecode(b"odd\xff")
    script = f"from shared.errors import run_main; run_main(lambda: print({odd!r}))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, "odd\\udcff\n")
    path = tmp_path / "x.json"
    path.write_bytes(dump_json({"name": odd}))
    path.read_bytes().decode("utf-8")  # any reader of JSON takes it
    assert json.loads(path.read_bytes()) == {"name": odd}


@pytest.mark.parametrize("kind", [TypeError, AttributeError, NameError, AssertionError, KeyError])
def test_a_mistake_passes_as_it_is_and_at_once(kind, monkeypatch):
    monkeypatch.setattr(retry.time, "sleep", lambda _: pytest.fail("a mistake was tried again"))
    place = urls.place("memory://bucket/file")

    def act():
        raise kind("ours")

    with pytest.raises(kind):
        place._attempt(act)
    assert is_mistake(kind())


def test_what_a_library_raises_is_no_mistake(monkeypatch):
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    place = urls.place("memory://bucket/file")

    class ClientError(KeyError):
        """As libraries have them."""

    def act():
        raise ClientError("slow down")

    with pytest.raises(UserError, match="cannot be reached"):
        place._attempt(act)


def test_a_shard_of_before_and_one_of_today_are_read():
    layout = cache_layout((1, 4, 8, 8), (1, 16, 64)).to_json()
    row = {"file": "shards/a.tar", "layout": layout, "count": 1, "size": 1, "sha256": "0" * 64}
    assert Shard.from_json(row).to_json() == row
    today = row | {"first_key": "0123456789abcdef"}
    assert Shard.from_json(today).to_json() == today
    for odd in ({"count": -1}, {"count": True}, {"count": 1.0}, {"file": "shards/../x"},
                {"file": "samples/x"}, {"sha256": "../x"}, {"colour": 1}):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            Shard.from_json(row | odd)
    with pytest.raises(ValueError, match="shards"):
        UnitRecord.from_json({})


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_that_a_library_made_an_error_of_is_one_all_the_same(
    capsys, number, status
):
    """torch does so where it happens to look at a storage just then."""

    def main() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type 'X'") from None

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == status
    assert capsys.readouterr().err.startswith("interrupted: ")
