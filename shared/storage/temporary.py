"""Temporary files, held by a lock as long as their process lives, and the sweep of what is left.

A process keeps what it has not yet published in a folder of its own in `tmp`, `held-REACH-RANDOM`,
whose file `lock` it holds with flock(2). The kernel lets go of it however the process ends, so a
lock that can be taken says that its owner is dead, whatever PID namespace or container either is
in. That is sure where both see the file system through one mount of one kernel, which REACH names.
Elsewhere (another host, another mount, one from before the machine was started again) a lock that
is held still means life, but one that is free need not mean death, since some network file systems
keep locks to themselves: what is there counts as left after a day without a change. So does what
has no lock: on file systems without locks, and what versions before this one named after host and
process.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import hashlib
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shared.errors import UserError

KEPT_SECONDS, ATTEMPTS = 24 * 3600.0, 1000
LOCK, UNLOCKED = "lock", "no-lock"  # the latter where the file system has no locks
HELD = re.compile(r"held-([0-9a-f]{12})-[0-9a-f]{12}")


@contextmanager
def temporary(tmp: Path, label: str = "") -> Iterator[Path]:
    """Yield a fresh name in `tmp` for a file or folder, which no sweep touches while it is in use.

    What is still there in the end, since it was not moved to its place, is removed.
    """
    with _desks.open(tmp) as folder:
        path = folder / f"{os.urandom(6).hex()}{label}"
        try:
            yield path
        finally:
            _remove(path)


def scratch(url: str) -> Path:
    """Return the local folder for what is on its way to a URL, in the system's temporary folder.

    Others may write there, too, and its name is no secret: it is made for this user alone. Raises
    UserError where something that is not this user's own folder has the name.
    """
    name = hashlib.sha256(url.encode()).hexdigest()[:12]
    path = Path(tempfile.gettempdir(), f"distillery-{os.geteuid()}-{name}")
    with contextlib.suppress(OSError):  # opening it tells why
        path.mkdir(0o700)
    try:
        # What opens is a folder and no link, and what is asked and changed is what was opened.
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise UserError(
            f"{path}: not a folder that can be used for temporary files ({error.strerror}); "
            "remove it, or set TMPDIR to a folder of your own"
        ) from None
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise UserError(
                f"{path} belongs to another user, who could change what is uploaded; "
                "set TMPDIR to a folder of your own"
            )
        if os.fstat(fd).st_mode & 0o077:  # of a version that left that to the umask
            os.fchmod(fd, 0o700)
    finally:
        os.close(fd)
    return path


def strays(tmp: Path, young: bool = False) -> Iterator[Path]:
    """Yield what dead processes left in `tmp`; with `young` all not known to be a living one's.

    For the user who says that nothing is running: then nobody need wait for a day.
    """
    for path in list(tmp.iterdir()) if tmp.is_dir() else ():
        with contextlib.suppress(FileNotFoundError), _owner_of(path, young) as owner:
            if owner is not _Owner.ALIVE:
                yield path


def sweep(tmp: Path, young: bool = False) -> None:
    """Remove what dead processes left in `tmp` (see `strays`); a living one's files stay.

    So does what another user left, who alone may remove it.
    """
    for path in list(tmp.iterdir()) if tmp.is_dir() else ():
        with contextlib.suppress(FileNotFoundError, PermissionError):
            with _owner_of(path, young) as owner:
                if owner in (_Owner.DEAD, _Owner.NOBODY):
                    _clear(path)
            if owner is not _Owner.ALIVE:
                _remove_folder(path)


@dataclass
class _Desk:
    """A folder that this process holds, for so many names at a time."""

    name: str
    lock: int  # a file descriptor
    users: int = 0


class _Desks:
    """The folders that this process holds, at most one in each `tmp`."""

    def __init__(self) -> None:
        self.forget()
        os.register_at_fork(after_in_child=self.forget_parents)

    def forget(self) -> None:
        self.held: dict[Path, _Desk] = {}
        self.mutex = threading.Lock()

    def forget_parents(self) -> None:
        """Let a child have folders of its own, and not keep its parent's alive."""
        for desk in self.held.values():
            os.close(desk.lock)
        self.forget()

    @contextmanager
    def open(self, tmp: Path) -> Iterator[Path]:
        """Yield this process's folder in `tmp`, which is there as long as anybody uses it."""
        key = tmp.absolute()
        with self.mutex:
            if key not in self.held:
                self.held[key] = _take(tmp)
            desk = self.held[key]
            desk.users += 1
        try:
            yield tmp / desk.name
        finally:
            with self.mutex:
                desk.users -= 1
                if not desk.users and self.held.get(key) is desk:
                    del self.held[key]
                    os.close(desk.lock)  # nothing needs it any more
                    with contextlib.suppress(OSError):
                        _clear(tmp / desk.name)
                    _remove_folder(tmp / desk.name)

    def owns(self, folder: Path) -> bool:
        """Is it this process's? Closing its lock, opened anew, could let go of it over NFS."""
        desk = self.held.get(folder.parent.absolute())
        return desk is not None and desk.name == folder.name


_desks = _Desks()


def _take(tmp: Path) -> _Desk:
    """Make a folder in `tmp` and lock it; a sweep that comes in between makes it begin again."""
    attempts = ATTEMPTS
    while True:
        attempts -= 1
        try:
            tmp.mkdir(parents=True, exist_ok=True)
            folder = tmp / f"held-{_reach(tmp)}-{os.urandom(6).hex()}"
            folder.mkdir()
            fd = _create(folder / LOCK)
        except FileNotFoundError:  # swept, or another process has removed an empty `tmp`
            if not attempts:  # or nothing can be made there, as in a working folder that is gone
                raise
            continue
        locked = _lock(fd)
        if locked is None:
            os.replace(folder / LOCK, folder / UNLOCKED)
        if locked is None or (locked and _is_open_as(folder / LOCK, fd)):
            return _Desk(folder.name, fd)
        os.close(fd)


def _create(path: Path) -> int:
    """Return a new file, open; its folder goes again where that is refused."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError:
        with contextlib.suppress(OSError):
            path.parent.rmdir()
        raise


def _lock(fd: int) -> bool | None:
    """Take the lock if nobody has it; None where the file system cannot say."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_open_as(path: Path, fd: int) -> bool:
    """Is the open file still the one of that name?"""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


class _Owner(enum.Enum):
    """Whose something in `tmp` is."""

    ALIVE = enum.auto()
    DEAD = enum.auto()  # its lock is ours while we look
    NOBODY = enum.auto()  # it has no lock
    LEAVING = enum.auto()  # an empty folder: the last that goes, but also the first that comes


@contextmanager
def _owner_of(path: Path, young: bool) -> Iterator[_Owner]:
    """Was it left by a dead process? Nobody else sweeps what has a lock meanwhile."""
    held = HELD.fullmatch(path.name)
    if held is None:
        yield _Owner.NOBODY if young or _age(path) > KEPT_SECONDS else _Owner.ALIVE
        return
    try:
        fd = None if _desks.owns(path) else os.open(path / LOCK, os.O_RDWR)
    except FileNotFoundError:
        if not any(path.iterdir()):
            yield _Owner.LEAVING
        else:
            yield _Owner.NOBODY if young or _age(path) > KEPT_SECONDS else _Owner.ALIVE
        return
    except PermissionError:
        fd = None
    if fd is None:
        yield _Owner.ALIVE
        return
    try:
        locked = _lock(fd)
        sure = young or (locked and held[1] == _reach(path.parent))
        left = locked is not False and (sure or _age(path) > KEPT_SECONDS)
        yield _Owner.DEAD if left else _Owner.ALIVE
    finally:
        os.close(fd)


def _reach(folder: Path) -> str:
    """Name where a lock in `folder` is seen for sure: in this kernel, through the same mount."""
    where = f"{_kernel()} {folder.stat().st_dev}"
    return hashlib.sha256(where.encode()).hexdigest()[:12]


@cache
def _kernel() -> str:
    """Return what all containers of a machine have in common, from one start to the next."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _age(path: Path) -> float:
    """Return seconds since the file, or anything in the folder, was changed."""
    inside = path.iterdir() if path.is_dir() and not path.is_symlink() else ()
    changed: float = max(found.lstat().st_mtime for found in (path, *inside))
    return time.time() - changed


def _clear(path: Path) -> None:
    """Remove a stray, or what a held folder holds, its lock last: it tells whose the folder is."""
    if not HELD.fullmatch(path.name):
        _remove(path)
        return
    for inside in path.iterdir():
        if inside.name != LOCK:
            _remove(inside)
    (path / LOCK).unlink(missing_ok=True)


def _remove_folder(folder: Path) -> None:
    """Remove an empty folder, if it is there. Over NFS it is empty once its lock is closed."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):  # what stays is left to the next sweep
            shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)
