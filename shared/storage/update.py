"""A small file that several processes read, change and write: no change is lost."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.storage.files import create_exclusively, guard, publish
from shared.storage.reading import read_if_there
from shared.storage.urls import Place, RemotePlace

# None for a file that is not there, and to leave it.
Change = Callable[[bytes | None], bytes | None]


def update(path: Place, change: Change, tmp: Path) -> None:
    """Replace what a file holds by what `change` makes of it, as if nobody else did meanwhile.

    `change` may be called several times: where another process was faster it is given what that
    one wrote. On a disk others wait for a lock on the file; on S3 a write counts only if the file
    is still the one that was read. File systems without locks, and other object storage, notice a
    file that was created meanwhile, but not one that was replaced.
    """
    done = _updated_remotely if isinstance(path, RemotePlace) else _updated_locally
    while not done(path, change, tmp):  # type: ignore[arg-type]
        pass


def _updated_locally(path: Path, change: Change, tmp: Path) -> bool:
    with guard(path.parent), _locked(path) as current:
        if not current:
            return False
        content = read_if_there(path)
        changed = change(content)
        if changed is None:
            return True
        if content is None:
            return create_exclusively(changed, path, tmp)
        publish([changed], path, tmp)
        return True


def _updated_remotely(path: RemotePlace, change: Change, tmp: Path) -> bool:
    tag = path.tag()  # before the content: a file that is replaced in between has another
    content = read_if_there(path)
    changed = change(content)
    if changed is None:
        return True
    return path.create(changed) if content is None else path.swap(changed, tag)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the file's lock; False where another has replaced or removed it while this one waited.

    A file that is not there cannot be locked, and need not be.
    """
    try:
        try:
            fd = os.open(path, os.O_RDWR)  # which a lock over NFS asks for
        except PermissionError:  # another user's, in a folder of several
            fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield True
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            current = os.path.samestat(path.stat(), os.fstat(fd))
        except FileNotFoundError:
            current = False
        yield current
    finally:
        os.close(fd)
