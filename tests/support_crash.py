"""Kills `prep encode` at every call that changes the cache, then runs it again undisturbed.

    python tests/support_crash.py SHARD... --work FOLDER [--modes before half after] [--lanes 2]

A process killed by a signal leaves exactly what the calls before it did, so dying inside a wrapper
around os.write and its like, at the n-th of them for every n, covers every moment. Everything is
imported once and a child is forked per crash. Prints JSON: the calls of an undisturbed run, how
many crashes were tried, and what went wrong.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path, so the repository is not on it

import torch  # noqa: E402

from prep.commands import encode  # noqa: E402
from prep.config import EncodeConfig  # noqa: E402

KILLED = 137
CHANGING = ("write", "fsync", "replace", "rename", "link", "unlink")  # killed at each of these


class Calls:
    """Wraps the functions of `os` that change files below `cache`, counts them, dies at one."""

    def __init__(self, cache: Path, die_at: int | None = None, mode: str = "") -> None:
        self.cache, self.die_at, self.mode = str(cache), die_at, mode
        self.paths: dict[int, str] = {}  # of file descriptors
        self.log: list[tuple[str, ...]] = []

    def install(self) -> None:
        real_open = os.open

        def open(path: Any, *args: Any, **options: Any) -> int:
            fd = real_open(path, *args, **options)
            self.paths[fd] = os.fspath(path)
            return fd

        os.open = open
        for name in CHANGING:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            on_fd = name in ("write", "fsync")
            touched = [self.paths.get(args[0], "")] if on_fd else [str(arg) for arg in args[:2]]
            if not any(path.startswith(self.cache) for path in touched):
                return real(*args, **options)
            here = len(self.log) == self.die_at
            self.log.append((name, *(os.path.relpath(path, self.cache) for path in touched)))
            if here and self.mode == "before":
                os._exit(KILLED)
            if here and self.mode == "half":
                real(args[0], memoryview(args[1])[: len(args[1]) // 2])
                os._exit(KILLED)
            result = real(*args, **options)
            if here and self.mode == "after":
                os._exit(KILLED)
            return result

        return call


def forked(work: Callable[[], None], log: Path) -> int:
    """Run `work` in a child; its exit status, 1 for an exception. What it prints goes to `log`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        work()
        status = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def job(shards: tuple[str, ...], cache: Path) -> None:
    """The small job that is disturbed: the batches make every unit take several of them."""
    encode(
        EncodeConfig(
            shards,
            "tiny-sd",
            cache,
            threads=1,
            vae_batch_size=2,
            text_batch_size=2,
            decode_workers=1,
            report=False,
        )
    )


def content(cache: Path) -> dict[str, str]:
    """Every file with its hash."""
    files = [path for path in sorted(cache.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def crash(shards: tuple[str, ...], folder: Path, n: int, mode: str, wanted: dict[str, str]) -> str:
    """Die at call `n`, go on, compare; says what went wrong, if anything did."""
    cache, log = folder / "cache", folder / "log"
    shutil.rmtree(cache, ignore_errors=True)

    def dying() -> None:
        Calls(cache, n, mode).install()
        job(shards, cache)

    if (status := forked(dying, log)) != KILLED:
        return f"ended with status {status} instead of dying: {log.read_text()[-300:]}"
    if (status := forked(lambda: job(shards, cache), log)) != 0:
        return f"went on with status {status}: {log.read_text()[-600:]}"
    found = content(cache)
    differing = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    return f"other bytes: {', '.join(differing)}" if differing else ""


def undisturbed(shards: tuple[str, ...], folder: Path) -> tuple[list[Any], dict[str, str]]:
    """The calls of a whole run and the cache it makes."""
    cache, calls = folder / "cache", folder / "calls"

    def traced() -> None:
        counted = Calls(cache)
        counted.install()
        job(shards, cache)
        calls.write_text(json.dumps(counted.log))

    status = forked(traced, folder / "log")
    assert status == 0, (folder / "log").read_text()
    return json.loads(calls.read_text()), content(cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", default=["before", "half", "after"])
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--distinct", action="store_true", help="not again just after an fsync")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shards = tuple(args.shards)
    calls, wanted = undisturbed(shards, args.work)
    points = [
        (n, mode)
        for n, call in enumerate(calls)
        for mode in args.modes
        if mode != "half" or call[0] == "write"
    ]
    if args.distinct:  # a killed process leaves the same files before an fsync as after it
        after_fsync = {n + 1 for n, call in enumerate(calls) if call[0] == "fsync"}
        points = [p for p in points if p[1] != "before" or p[0] not in after_fsync]
    lanes, driver = [], os.getpid()
    for lane in range(args.lanes):
        folder = args.work / f"lane{lane}"
        folder.mkdir()

        def run(folder: Path = folder, mine: Any = points[lane :: args.lanes]) -> None:
            answers = []
            for n, mode in mine:
                assert os.getppid() == driver, "the driver was stopped"
                if problem := crash(shards, folder, n, mode, wanted):
                    answers.append({"n": n, "mode": mode, "call": calls[n], "problem": problem})
            (folder / "answers").write_text(json.dumps(answers))

        child = os.fork()
        if not child:
            status = 1
            try:
                run()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        lanes.append((child, folder))
    problems = []
    for child, folder in lanes:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "a lane failed"
        problems += json.loads((folder / "answers").read_text())
    print(
        json.dumps({"calls": calls, "files": wanted, "crashes": len(points), "problems": problems})
    )


if __name__ == "__main__":
    main()
