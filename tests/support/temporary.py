"""Processes that hold temporary files, dead and alive, as a sweep finds them."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from shared.storage.temporary import temporary

with temporary(Path(sys.argv[1]), "-spool") as path:
    path.write_bytes(b"x" * int(sys.argv[2]))
    print(path, flush=True)
    time.sleep(600)
"""
# As a container's first process: what it does is pid 1 of a namespace of its own.
CONTAINED = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@contextmanager
def holding(tmp: Path, size: int = 1, prefix: Sequence[str] = ()) -> Iterator[Path]:
    """A living process's temporary file in `tmp`; it is killed, and leaves it, in the end."""
    words = [*prefix, sys.executable, "-c", HOLD, str(tmp), str(size)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Path(process.stdout.readline().strip())
        finally:
            process.kill()


def left_by_the_dead(tmp: Path, size: int = 1) -> Path:
    """A file that a killed process has left in `tmp`."""
    with holding(tmp, size) as path:
        pass
    assert path.exists()
    return path


def can_unshare() -> bool:
    """May this user make PID namespaces?"""
    try:
        return subprocess.run([*CONTAINED, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
