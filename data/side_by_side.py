"""Commands that run side by side, on a thread each; what they say goes to files."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UserError


@dataclass(frozen=True)
class Job:
    """Something to do, once the job named `after` is done."""

    work: Callable[[], None]
    after: str | None = None


class Workers:
    """Run jobs, so many at a time. After one has failed, or Ctrl-C, no command begins any more."""

    def __init__(self, logs: Path, count: int) -> None:
        self.logs = logs
        self.count = count
        self.stopped = threading.Event()
        self.children = set[subprocess.Popen[bytes]]()

    def command(self, log: str, *words: str | Path) -> None:
        """Run `python -m ...` on one thread, its output at the end of LOGS/`log`.log.

        Raises UserError with that file's name where it fails, CancelledError after another has.
        """
        if self.stopped.is_set():
            raise CancelledError
        self.logs.mkdir(parents=True, exist_ok=True)
        path, typed = self.logs / f"{log}.log", [str(word) for word in words]
        with path.open("a") as out:
            out.write(f"$ python -m {shlex.join(typed)}\n")
            out.flush()
            status = self.call([sys.executable, "-m", *typed], out.fileno())
        if status and not self.stopped.is_set():
            self.stopped.set()
            raise UserError(f"python -m {' '.join(typed[:2])} failed; {path} says why")
        if status:
            raise CancelledError

    def call(self, words: list[str], out: int) -> int:
        """Return a child's exit status. It ends with its parent."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(words, stdout=out, stderr=out, env=environment)
        self.children.add(child)
        try:
            if self.stopped.is_set():  # meanwhile
                child.terminate()
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        finally:
            self.children.discard(child)

    def run(self, jobs: Mapping[str, Job]) -> None:
        """Do all jobs; what a job comes `after` stands before it.

        Raises the error of the one that failed, when what ran beside it has ended.
        """
        ends = dict[str, Future[None]]()

        def do(job: Job) -> None:
            if job.after:
                ends[job.after].result()
            if self.stopped.is_set():
                raise CancelledError
            job.work()

        with ThreadPoolExecutor(self.count) as pool:
            try:
                for name, job in jobs.items():
                    ends[name] = pool.submit(do, job)
                wait(ends.values())
            except BaseException:  # Ctrl-C and SIGTERM arrive here, the latter at no child
                self.stopped.set()
                for child in list(self.children):
                    child.terminate()
                raise
        errors = [error for end in ends.values() if (error := end.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, CancelledError)):
            raise error
