"""Who writes a run: one process at a time.

`owner.json` in the run's folder names the process, which holds a lock (flock) on it as long as it
lives, also over NFS; a process that ends removes the file, and what a killed one left is free.
Another takes over by putting a file of its own in its place. The former owner, should it wake,
finds that out before it publishes anything (shared/storage/ownership.py).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from shared.errors import UserError
from shared.storage import ownership
from shared.storage.files import dump_json, guard, move, staged
from shared.storage.reading import open_regular

OWNER = "owner.json"
LOCKED = {errno.EACCES, errno.EAGAIN}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class Owner:
    """A process that writes a run. `token` is its alone."""

    work: str  # the command
    host: str
    pid: int
    since: str
    token: str

    def __str__(self) -> str:
        return f"`{self.work}` on {self.host} (pid {self.pid}, since {self.since})"


@dataclass(frozen=True)
class Held:
    """A run that this process owns; the lock goes with `file`."""

    folder: Path
    owner: Owner
    file: BinaryIO

    def check(self) -> None:
        """Raise UserError where `owner.json` does not name this process any more."""
        other = written(self.folder)
        if other != self.owner:
            by = f"was taken over by {other}" if other else f"has lost its {OWNER}"
            raise UserError(
                f"{self.folder} {by} while this process slept or hung; it ends here and has "
                "published nothing since"
            )


_held: dict[Path, Held] = {}


def written(folder: Path) -> Owner | None:
    """Whom `owner.json` names; None where there is none, or nothing that can be read."""
    try:
        return Owner(**json.loads((folder / OWNER).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def holder(folder: Path) -> Owner | None:
    """The living process, other than this one, that owns a run.

    Where the file system has no locks, everyone who did not say that he ended counts as living.
    Raises UserError where nobody can tell: `owner.json` is no file, or may not be read.
    """
    if ownership.absolute(folder) in _held or not folder.is_dir():
        return None
    try:
        with open_regular(folder / OWNER) as file:
            return None if lock(file, fcntl.LOCK_SH) else written(folder)
    except FileNotFoundError:
        return None


def lock(file: BinaryIO, kind: int) -> bool:
    """Lock a file without waiting; False where another process has it, or none can have it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in LOCKED | NO_LOCKS:
            raise
        return False
    return True


def refuse_other(folder: Path, remedy: str) -> None:
    """Raise UserError, naming it and how to go on, where another process owns the run."""
    if other := holder(folder):
        raise UserError(f"{folder} is being written by {other}; {remedy}")


def take(folder: Path, work: str, remedy: str, take_over: bool = False) -> None:
    """Become the run's owner. Raises UserError where another is, unless it is to be replaced.

    Of several that find it free at once, the last to come owns it.
    """
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    owner = Owner(work, socket.gethostname(), os.getpid(), since, secrets.token_hex(8))
    with staged([dump_json(asdict(owner))], folder / "tmp") as (path, _):
        file = path.open("r+b")
        try:
            lock(file, fcntl.LOCK_EX)  # before anybody sees it
            if not take_over:
                refuse_other(folder, remedy)
            elif other := holder(folder):
                print(f"note: {folder} is taken over from {other}", file=sys.stderr)
            release(folder)
            move(path, folder / OWNER)
        except BaseException:
            file.close()
            raise
    root = ownership.absolute(folder)
    _held[root] = Held(root, owner, file)
    ownership.taken[root] = _held[root].check


def release(folder: Path) -> None:
    """Give the run up, where this process owns it."""
    root = ownership.absolute(folder)
    ownership.taken.pop(root, None)
    if held := _held.pop(root, None):
        with held.file, guard(root):
            if written(root) == held.owner:
                (root / OWNER).unlink(missing_ok=True)


@contextmanager
def owning(folder: Path, work: str, remedy: str) -> Iterator[None]:
    """Own a run while something is written into it; a folder that is no run is nobody's."""
    if not (folder / "config.json").is_file():
        yield
        return
    take(folder, work, remedy)
    try:
        yield
    finally:
        release(folder)
