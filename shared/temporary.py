"""Temporary names that tell their owner, and the sweeping of what dead owners left."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FOREIGN_SECONDS = 24 * 3600.0


def temporary(tmp: Path, label: str = "") -> Path:
    """A fresh name in `tmp` that tells which process of which machine it belongs to."""
    return tmp / f"{_host()}-{os.getpid()}-{os.urandom(6).hex()}{label}"


def scratch(url: str) -> Path:
    """The local folder for what is on its way to a URL, in the system's temporary folder."""
    name = hashlib.sha256(url.encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir(), f"distillery-{os.getuid()}-{name}")


def strays(tmp: Path) -> Iterator[Path]:
    """What dead processes left in `tmp`.

    Of another machine's processes nothing is known (several may share a cache), so their files
    count as left after a day without a change.
    """
    for path in tmp.iterdir() if tmp.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # its owner was faster
            if _abandoned(path):
                yield path


def sweep(tmp: Path) -> None:
    """Remove what dead processes left in `tmp`; a living process's files stay."""
    for stray in list(strays(tmp)):
        shutil.rmtree(stray) if stray.is_dir() else stray.unlink(missing_ok=True)


def _abandoned(path: Path) -> bool:
    host, pid, *_ = [*path.name.split("-"), ""]
    if host == _host() and pid.isdigit():
        return not _alive(int(pid))
    return time.time() - path.stat().st_mtime > FOREIGN_SECONDS


def _host() -> str:
    return socket.gethostname().replace("-", "_")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
