"""Kills `train distill` at every call that changes its run folder, or at random moments.

    python tests/support/train_crash.py SCENARIO... --work FOLDER [--modes before half after]
    python tests/support/train_crash.py lora full --work FOLDER --cache CACHE --signal KILL|TERM

`save`, `save again` and `branch` write checkpoints of small tensors; `lora`, `full` and `dmd` are
whole runs, `evaluated` one that is evaluated. Everything is imported once and a child is forked per
crash. After each crash every checkpoint in sight must be whole; the same command, undisturbed, must
then end with the same files. Prints JSON for each scenario: the calls of an undisturbed run or the
statuses of those signalled, and what went wrong.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run by path, so the repository is not on it

import psutil  # noqa: E402
import torch  # noqa: E402
from torch.utils import tensorboard  # noqa: E402, F401 (or each child would import it)

from shared.errors import run_main  # noqa: E402
from tests.support.calls import KILLED, Calls, forked, in_child, telling  # noqa: E402
from tests.support.train_crash_scenarios import (  # noqa: E402
    RUN,
    Scenario,
    branch_off,
    distilling,
    save_again,
    save_on,
)
from train.state import checkpoint  # noqa: E402

TIMES = ("samples_per_second", "loader_wait", "peak_process_memory_bytes", "seconds")


def whole_files(folder: Path) -> dict[str, str]:
    """What a run has to show, by content; of its logs what time does not change.

    Checkpoints beyond the limit may be left where the last one was saved and nothing pruned.
    """
    newest = checkpoint.latest_checkpoint(folder)
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        older = name.startswith("checkpoints/") and newest not in path.parents
        if name.startswith("tmp/"):
            found[name] = "a stray"
        if path.is_dir() or older or name.startswith(("logs/", "tmp/")):
            continue
        content = path.read_bytes()
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in content.decode().splitlines()]
            kept = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
            content = json.dumps(kept).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def look() -> None:
    """Every checkpoint in sight is whole."""
    seen = sorted(Path("run/checkpoints").glob("*"))
    assert seen == sorted(checkpoint.whole_checkpoints(RUN)), seen
    for folder in seen:
        step = checkpoint.read_progress(folder).step
        assert folder.name == f"step-{step:08d}"
        assert checkpoint.load_networks(folder)
        assert checkpoint.load_optimizer(folder)


class Play:
    """A scenario in a folder: what was there before it, and what is after it."""

    def __init__(self, scenario: Scenario, work: Path) -> None:
        self.scenario, self.work = scenario, work
        work.mkdir()
        self.log = work / "log"
        for place, part in (("before", scenario.begin), ("whole", self.traced)):
            if place == "whole":
                self.fresh(place)
            status = forked(partial(self.at, place, part), self.log)
            assert status == 0, self.log.read_text()
        self.wanted = whole_files(work / "whole" / RUN)
        traced = json.loads((work / "traced.json").read_text())
        self.calls, self.seconds = traced["calls"], traced["seconds"]

    def at(self, place: str, work: Callable[[], None]) -> None:
        (self.work / place).mkdir(exist_ok=True)
        os.chdir(self.work / place)
        work()

    def fresh(self, place: str) -> None:
        shutil.rmtree(self.work / place, ignore_errors=True)
        shutil.copytree(self.work / "before", self.work / place)

    def traced(self) -> None:
        calls, start = Calls(RUN), time.process_time()
        calls.install()
        self.scenario.run()
        answer = {"calls": calls.log, "seconds": time.process_time() - start}
        (self.work / "traced.json").write_text(json.dumps(answer))

    def command(self) -> None:
        """As a shell runs it, but without the clean-up of the driver that this was forked from."""
        try:
            run_main(self.scenario.run)
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(end.code or 0))

    def crash(self, place: str, n: int, mode: str) -> str:
        """Die at call `n`, look, go on, compare; says what went wrong, if anything did."""
        self.fresh(place)
        log = self.work / f"{place}.log"

        def dying() -> None:
            Calls(RUN, n, mode).install()
            self.scenario.run()

        if (status := forked(lambda: self.at(place, dying), log)) != KILLED:
            return f"ended with status {status} instead of dying: {log.read_text()[-300:]}"
        return self.end(place, log)

    def end(self, place: str, log: Path) -> str:
        """Look, then run it once more, undisturbed: what differs, if anything does."""

        def resumed() -> None:
            look()
            self.scenario.run()

        if (status := forked(lambda: self.at(place, resumed), log)) != 0:
            return f"went on with status {status}: {log.read_text()[-900:]}"
        return self.differing(place)

    def differing(self, place: str) -> str:
        """The names of files that are not as an undisturbed run leaves them."""
        found, wanted = whole_files(self.work / place / RUN), self.wanted
        names = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
        return f"other bytes: {', '.join(names)}" if names else ""


def enumerated(play: Play, modes: list[str], named: list[str], every: int) -> dict[str, Any]:
    """Die at every call, or at those whose words hold one of `named`, or at each n-th moment.

    A killed process leaves the same files before an fsync as after it, so that is tried once.
    """
    after_fsync = {n + 1 for n, call in enumerate(play.calls) if call[0] == "fsync"}
    points = [
        (n, mode)
        for n in sorted(telling(play.calls))
        for mode in modes
        if mode != "half" or play.calls[n][0] == "write"
        if not (mode == "before" and n in after_fsync and not named)
        if not named or any(name in " ".join(play.calls[n]) for name in named)
    ][::every]
    problems = [
        {"call": play.calls[n], "n": n, "mode": mode, "problem": problem}
        for n, mode in points
        if (problem := play.crash("place", n, mode))
    ]
    return {"calls": play.calls, "crashes": len(points), "problems": problems}


def signalled(play: Play, by: int, count: int, seed: int) -> dict[str, Any]:
    """Signals at random moments; what goes on is signalled again, what is done begins anew.

    Moments of CPU time, which is not shifted by what else the machine does.
    """
    rng, log, place = random.Random(seed), play.work / "signalled.log", "signalled"
    play.fresh(place)
    problems: list[str] = []
    statuses: list[int] = []
    stages = set()
    while len(statuses) < count and not problems:
        child = os.fork()
        if not child:
            os._exit(in_child(partial(play.at, place, play.command), log))
        moment, process = rng.uniform(0.05, 1.1 * play.seconds), psutil.Process(child)
        while process.status() != psutil.STATUS_ZOMBIE and sum(process.cpu_times()[:2]) < moment:
            time.sleep(0.002)
        in_time = process.status() != psutil.STATUS_ZOMBIE
        twice = rng.random() < 0.3
        for _ in range(1 + twice):
            os.kill(child, by)
            time.sleep(0.01)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if in_time:
            statuses.append(status)
        stages.add(published(play.work / place / RUN))
        said = log.read_text()
        done = "student: " in said and status == 0
        problem = unexpected(status, said, by, twice)
        if done and not problem:
            problem = play.differing(place)
        if problem:
            problems.append(f"after {moment:.2f} s: {problem}")
        if done:
            play.fresh(place)
    if not problems and (problem := play.end(place, log)):
        problems.append(problem)
    return {"statuses": statuses, "stages": len(stages), "problems": problems}


def published(folder: Path) -> frozenset[str]:
    """The names in a run's folder: how far it has come."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return frozenset(str(path) for path in paths if path.parts[0] not in ("tmp", "logs"))


def unexpected(status: int, said: str, by: int, twice: bool) -> str:
    """A status or words that a user should not see."""
    killed = by == signal.SIGKILL or twice  # the second SIGTERM need not wait for words
    if "Traceback" in said:
        return f"a traceback: {said[-900:]}"
    if status == 0 or (status == -by and killed):
        return ""
    if by == signal.SIGTERM and status == 143 and said.count("interrupted: ") == 1:
        return ""  # before the first step
    return f"status {status}: {said[-600:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="+")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--modes", nargs="+", default=["before", "half", "after"])
    parser.add_argument("--named", nargs="+", default=[], help="only calls with these words")
    parser.add_argument("--every", type=int, default=1, help="only each so-manieth moment")
    parser.add_argument("--signal", choices=["KILL", "TERM"])
    parser.add_argument("--count", type=int, default=20, help="so many signals")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    scenarios = {
        "save": Scenario(lambda: save_on(3, 1)),
        "save again": Scenario(save_again, lambda: save_on(3, 3)),
        "branch": Scenario(branch_off, lambda: save_on(3, 3)),
    }
    if args.cache:
        watched = {"report_to": ("tensorboard",), "max_train_steps": 12, "checkpointing_steps": 3}
        flags = {**watched, "validation_steps": 4} if args.signal else {}
        if args.signal == "TERM":
            flags["checkpointing_steps"] = 1000
        for kind in ("lora", "full"):
            scenarios[kind] = Scenario(distilling(kind, args.cache.resolve(), **flags))
        matching = {"objective": "dmd", "fake_updates": 2, "fake_warmup_steps": 1}
        matching |= {"gan_weight": 0.01, "num_student_steps": 2}
        scenarios["dmd"] = Scenario(distilling("lora", args.cache.resolve(), **flags, **matching))
        watching = {"evaluation_steps": 2, "num_eval_samples": 65, "num_ddim_timesteps": 1}
        watching |= {"eval_cache": args.cache.resolve(), "validation_steps": 0}
        scenarios["evaluated"] = Scenario(distilling("lora", args.cache.resolve(), **watching))
        for objective, kind in {"pcm": "lora", "tcd": "full", "lcf": "full"}.items():
            run = distilling(kind, args.cache.resolve(), objective=objective, **flags)
            scenarios[objective] = Scenario(run)
    answers = {}
    for name in args.scenarios:
        play = Play(scenarios[name], args.work.resolve() / name)
        if args.signal:
            by = getattr(signal, f"SIG{args.signal}")
            answers[name] = signalled(play, by, args.count, args.seed)
        else:
            answers[name] = enumerated(play, args.modes, args.named, args.every)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
