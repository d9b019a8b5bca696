"""Commands side by side: order, failures, and that they end with what has started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.side_by_side import Job, Workers
from shared.errors import UserError

REPO = Path(__file__).resolve().parent.parent
PRINT = ("timeit", "-n", "1", "-r", "1", "-s")  # `python -m timeit`: any statement as a command


def do(workers: Workers, name: str, statement: str) -> Callable[[], None]:
    return lambda: workers.command(name, *PRINT, statement)


def test_what_comes_after_another_waits_for_it(tmp_path: Path) -> None:
    workers = Workers(tmp_path / "logs", 2)
    first, second = tmp_path / "first", tmp_path / "second"
    late = f"import time; time.sleep(0.5); open({str(first)!r}, 'w')"
    workers.run({
        "first": Job(do(workers, "first", late)),
        "second": Job(do(workers, "second", f"open({str(first)!r}); open({str(second)!r}, 'w')"),
                      after="first"),
    })  # fmt: skip
    assert second.exists()


def test_a_failure_names_the_file_that_says_why_and_nothing_begins_after_it(tmp_path: Path) -> None:
    workers = Workers(tmp_path, 1)
    jobs = {name: Job(do(workers, name, "raise SystemExit('no room')")) for name in "abc"}
    begun = list[str]()
    jobs["d"] = Job(lambda: begun.append("d"), after="c")
    jobs["e"] = Job(lambda: begun.append("e"))
    with pytest.raises(UserError, match=r"python -m timeit -n failed; .*a\.log says why"):
        workers.run(jobs)
    assert begun == []
    assert [path.name for path in tmp_path.iterdir()] == ["a.log"]
    assert "no room" in (tmp_path / "a.log").read_text()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_children_end_with_it_and_the_rest_does_not_begin(tmp_path: Path, sent: int) -> None:
    program = f"""
from pathlib import Path
from data.side_by_side import Job, Workers
from shared.errors import run_main
workers = Workers(Path({str(tmp_path)!r}), 2)
def job(name):
    code = f"import os, time; open('{tmp_path}/{{name}}.pid', 'w').write(str(os.getpid())); "
    return Job(lambda: workers.command(name, *{PRINT!r}, code + "time.sleep(60)"))
run_main(lambda: workers.run({{name: job(name) for name in "abc"}}))
"""
    driver = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPO, stderr=subprocess.PIPE, start_new_session=True
    )
    pids = [tmp_path / "a.pid", tmp_path / "b.pid"]
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(driver.pid, sent)  # itself alone, as `kill` does it
    _, said = driver.communicate(timeout=30)
    assert driver.returncode == 128 + sent
    assert said.decode().count("\n") == 1
    for path in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert not (tmp_path / "c.log").exists()
