"""Kills commands of stage one at every call that changes files, then runs them again undisturbed.

    python tests/support/crash.py SCENARIO... --work FOLDER [--modes before half after] [--lanes 2]
    python tests/support/crash.py SCENARIO... --work FOLDER --random 50

A process killed by a signal leaves exactly what the calls before it did, so dying inside a wrapper
around os.write and its like, at the n-th of them for every n, covers every moment. Everything is
imported once and a child is forked per crash. After each crash a trainer looks at what is there:
it must see what was there before or what is there after an undisturbed run, whole. Prints JSON for
each scenario: the calls of an undisturbed run, how many crashes were tried, and what went wrong.
With --random the child gets a SIGKILL at a random moment instead.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run by path, so the repository is not on it

import psutil  # noqa: E402
import torch  # noqa: E402

from prep.archive.layout import SUMS, read_sums  # noqa: E402
from shared.errors import UserError  # noqa: E402
from tests.support.calls import KILLED, Calls, forked, in_child, telling  # noqa: E402
from tests.support.crash_scenarios import SCENARIOS, Place  # noqa: E402
from tests.support.reader import read_answers, read_cache  # noqa: E402


def content(folder: Path) -> dict[str, str]:
    """Every file with its hash."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def seen(place: Place) -> tuple[str, str]:
    """What a trainer sees of the cache and its answers, and a receiver of the archive."""
    try:
        cache = f"{read_cache(place.cache)} {read_answers(place.cache)}"
    except UserError as error:
        cache = "damaged" if "damaged" in str(error) else "no cache"
    try:
        sums = read_sums(place.archive)
        found = content(place.archive)
        archive = found[SUMS] if all(found[n] == sums[n] for n in sums) else "damaged"
    except UserError:
        archive = "no archive"
    return cache, archive


@dataclass
class Play:
    """A scenario in a folder: what was there before it, and what is after it."""

    name: str
    work: Path

    def __post_init__(self) -> None:
        self.scenario = SCENARIOS[self.name]
        self.work.mkdir()
        self.log = self.work / "log"
        (self.work / "sources").mkdir()
        self.before = self.place("before")
        self.before.root.mkdir()
        status = forked(lambda: self.scenario.begin(self.before), self.log)
        assert status == 0, self.log.read_text()
        self.calls, self.wanted, self.seconds = self.undisturbed()
        self.views = {seen(self.before), seen(self.place("whole"))}

    def place(self, name: str) -> Place:
        return Place(self.work / "sources", self.work / name)

    def fresh(self, name: str) -> Place:
        """The folder as it was before, with its times."""
        place = self.place(name)
        shutil.rmtree(place.root, ignore_errors=True)
        shutil.copytree(self.before.root, place.root)
        return place

    def undisturbed(self) -> tuple[list[Any], dict[str, str], float]:
        """The calls of a whole run, the files it leaves, and its CPU seconds."""
        place, calls = self.fresh("whole"), self.work / "calls"

        def traced() -> None:
            counted = Calls(place.root)
            counted.install()
            start = time.process_time()
            self.scenario.run(place)
            calls.write_text(json.dumps([counted.log, time.process_time() - start]))

        status = forked(traced, self.log)
        assert status == 0, self.log.read_text()
        log, seconds = json.loads(calls.read_text())
        return log, content(place.root), seconds

    def crash(self, lane: str, n: int, mode: str) -> str:
        """Die at call `n`, look, go on, compare; says what went wrong, if anything did."""
        place, log = self.fresh(lane), self.work / f"{lane}.log"

        def dying() -> None:
            Calls(place.root, n, mode).install()
            self.scenario.run(place)

        if (status := forked(dying, log)) != KILLED:
            return f"ended with status {status} instead of dying: {log.read_text()[-300:]}"
        return self.unseen(place) or self.end(place, log)

    def unseen(self, place: Place) -> str:
        """What a reader must not see, if it sees that."""
        cache, archive = seen(place)
        caches, archives = ({view[i] for view in self.views} for i in (0, 1))
        if cache not in caches | ({"no cache"} if self.scenario.may_refuse else set()):
            return f"a trainer sees {cache}"
        return "" if archive in archives else f"a receiver sees {archive}"

    def end(self, place: Place, log: Path) -> str:
        """Run it once more, undisturbed: what differs, if anything does."""
        if (status := forked(lambda: self.scenario.run(place), log)) != 0:
            return f"went on with status {status}: {log.read_text()[-600:]}"
        return self.differing(place)

    def differing(self, place: Place) -> str:
        """The names of files that are not as an undisturbed run leaves them."""
        found, wanted = content(place.root), self.wanted
        names = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
        return f"other bytes: {', '.join(names)}" if names else ""


def enumerated(
    play: Play, modes: list[str], lanes: int, distinct: bool, every: int
) -> dict[str, Any]:
    """Die at every call or at each n-th moment, in some processes at a time."""
    points = [
        (n, mode)
        for n in sorted(telling(play.calls))
        for mode in modes
        if mode != "half" or play.calls[n][0] == "write"
    ]
    if distinct:  # a killed process leaves the same files before an fsync as after it
        after_fsync = {n + 1 for n, call in enumerate(play.calls) if call[0] == "fsync"}
        points = [p for p in points if p[1] != "before" or p[0] not in after_fsync]
    points = points[::every]
    children, driver = [], os.getpid()
    for lane in range(lanes):
        answers = play.work / f"lane{lane}.json"

        def run(lane: int = lane, answers: Path = answers) -> None:
            found = []
            for n, mode in points[lane::lanes]:
                assert os.getppid() == driver, "the driver was stopped"
                if problem := play.crash(f"lane{lane}", n, mode):
                    found.append({"n": n, "mode": mode, "call": play.calls[n], "problem": problem})
            answers.write_text(json.dumps(found))

        log = play.work / f"lane{lane}.out"
        child = os.fork()
        if not child:
            os._exit(in_child(run, log))
        children.append((child, answers, log))
    problems = []
    for child, answers, log in children:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 0, f"a lane failed: {log.read_text()[-2000:]}"
        problems += json.loads(answers.read_text())
    return {"crashes": len(points), "problems": problems}


def killed_at_random(play: Play, kills: int) -> dict[str, Any]:
    """SIGKILL at random moments; what goes on is killed again, what is done begins anew.

    Moments of CPU time, which is not shifted by what else the machine does.
    """
    rng, place, log = random.Random(0), play.fresh("random"), play.work / "random.log"
    problems, killed, done, progress = [], 0, 0, set[int]()
    while killed < kills and not problems:
        child = os.fork()
        if not child:
            os._exit(in_child(partial(play.scenario.run, place), log))
        moment, process = rng.uniform(0, 1.1 * play.seconds), psutil.Process(child)
        while process.status() != psutil.STATUS_ZOMBIE and sum(process.cpu_times()[:2]) < moment:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed += status == -signal.SIGKILL
        if status not in (0, -signal.SIGKILL):
            problems.append(f"status {status}: {log.read_text()[-600:]}")
        elif problem := play.unseen(place) or ("" if status else play.differing(place)):
            problems.append(problem)
        published = content(place.root).keys() & play.wanted.keys()
        progress.add(len(published))
        if status == 0:
            place, done = play.fresh("random"), done + 1
    problems += filter(None, [play.end(place, log)])
    return {
        "killed": killed, "done_in_between": done, "stages": len(progress), "problems": problems
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", default=["before", "half", "after"])
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--distinct", action="store_true", help="not again just after an fsync")
    parser.add_argument("--every", type=int, default=1, help="only each so-manieth moment")
    parser.add_argument("--random", type=int, default=0, help="so many SIGKILLs, at any moment")
    args = parser.parse_args()
    torch.set_num_threads(1)
    answers = {}
    for name in args.scenarios:
        play = Play(name, args.work / name)
        answers[name] = {"calls": play.calls, "files": play.wanted, "seconds": play.seconds} | (
            killed_at_random(play, args.random)
            if args.random
            else enumerated(play, args.modes, args.lanes, args.distinct, args.every)
        )
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
