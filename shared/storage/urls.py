"""Where a cache can be: a folder, or behind a URL that fsspec knows, such as s3://bucket/cache."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from upath.extensions import ProxyUPath

from shared.errors import UserError
from shared.storage.errors import (
    cause_of,
    is_absence,
    is_mistake,
    known_protocol,
    status_of,
    without_password,
)
from shared.storage.retry import with_retries

T = TypeVar("T")

TRIES = 3  # of a call; object storage's own libraries have tried several times in each
BEYOND_END = 416  # the HTTP status of a range that begins where a file has ended
CHANGED = (409, 412)  # of a conditional write that comes too late
BLOCK_BYTES = 4 << 20  # of a file that is read from beginning to end


class RemotePlace(ProxyUPath):
    """A place behind a URL, with the part of pathlib's interface that a cache needs.

    `UPath` takes any failure for "there is no such file". Here a call that fails is made again,
    and in the end raises a UserError that names the URL; what is not there raises
    FileNotFoundError, as from a Path. Nothing of an earlier listing is believed.
    """

    __slots__ = ()

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Return the size and times; FileNotFoundError where there is nothing."""
        return self._attempt(super().stat)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Is there a file, or anything below this name?"""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        """Is there a file?"""
        try:
            return stat.S_ISREG(self.stat().st_mode)
        except FileNotFoundError:
            return False

    def file_sizes(self) -> dict[str, int]:
        """Return the name and size of each file in a folder; nothing where there is no folder."""
        try:
            found = self._attempt(lambda: self.fs.ls(self.path, detail=True))
        except FileNotFoundError:
            return {}
        files = [info for info in found if info["type"] == "file" and info["name"] != self.path]
        return {info["name"].rpartition("/")[2]: info["size"] for info in files}

    def glob(self, pattern: str) -> Iterator[RemotePlace]:  # type: ignore[override]
        """Yield the folder's files whose names match."""
        for name in self.file_sizes():
            if fnmatchcase(name, pattern):
                yield self / name

    def read_bytes(self) -> bytes:
        """Return the whole file."""
        return self.read_range(0, None)  # with a start s3fs does not ask for the size first

    def read_range(self, start: int, end: int | None) -> bytes:
        """Return bytes `start` to `end`, in one request; fewer where the file ends before."""
        return bytes(self._attempt(lambda: self._range(start, end)))

    def _range(self, start: int, end: int | None) -> bytes:
        try:
            return bytes(self.fs.cat_file(self.path, start=start, end=end))
        except Exception as error:
            if status_of(error) == BEYOND_END:
                return b""
            raise

    def open(self, mode: str = "rb", buffering: int = BLOCK_BYTES) -> BinaryIO:  # type: ignore[override]
        """Return the bytes as a file: read by the block, or exactly what is asked for with 0."""
        assert mode == "rb", "files are published, see shared.storage.files"
        raw = RangedFile(self.read_range, lambda: int(self.stat().st_size))
        return cast(BinaryIO, io.BufferedReader(raw, buffering) if buffering else raw)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        try:
            self.stat()  # S3 removes what is not there without a word
            self._attempt(lambda: self.fs.rm_file(self.path))
        except FileNotFoundError:  # never there, or another was faster
            if not missing_ok:
                raise

    def upload(self, file: Path) -> None:
        """Put a local file here, replacing what stood here; nobody sees a part of it."""
        self._write(lambda: self.fs.put_file(str(file), self.path))

    def create(self, content: bytes) -> bool:
        """Put `content` here unless something is here already; False if it is.

        Of several that try at once one wins, where the storage knows conditional writes.
        """
        if self.exists():
            return False
        try:
            self._write(lambda: self.fs.pipe_file(self.path, content, mode="create"))
        except FileExistsError:
            return False
        return True

    def tag(self) -> str | None:
        """Return by what S3 tells contents of this file apart; None elsewhere or for no file."""
        try:
            info = self._attempt(lambda: self.fs.info(self.path))
        except FileNotFoundError:
            return None
        return info.get("ETag") if self.protocol in ("s3", "s3a") else None

    def swap(self, content: bytes, tag: str | None) -> bool:
        """Replace the file, unless it has another `tag` by now; False if it has.

        Without a tag it is replaced whatever it is.
        """
        condition = {} if tag is None else {"IfMatch": tag}

        def act() -> None:
            try:
                self.fs.pipe_file(self.path, content, **condition)
            except Exception as error:
                if condition and (status_of(error) in CHANGED or is_absence(error)):
                    raise FileExistsError from error
                raise

        try:
            self._write(act)
        except FileExistsError:
            return False
        return True

    def _write(self, act: Callable[[], object]) -> None:
        try:
            self._attempt(act)
        except FileNotFoundError as error:  # there is no such bucket
            raise self._refused(error) from None

    def _attempt(self, act: Callable[[], T]) -> T:
        try:
            return with_retries(act, TRIES)
        except FileExistsError:  # the answer to `create`
            raise
        except Exception as error:  # each file system raises what its library does
            if is_mistake(error):
                raise
            if is_absence(error):
                absent = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
                raise absent from error
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> UserError:
        return UserError(
            f"{without_password(str(self))} cannot be reached ({cause_of(error)}); check the "
            "address and your access to it, then run the same command again"
        )


Place = Path | RemotePlace


class RangedFile(io.RawIOBase):
    """A remote file as Python's files are: `read` gives bytes START to END, `size` the end."""

    def __init__(self, read: Callable[[int, int], bytes], size: Callable[[], int]) -> None:
        super().__init__()
        self._read_range, self._size_of_all, self.position = read, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True: reading goes on elsewhere."""
        return True

    def tell(self) -> int:
        """Return where the next read starts."""
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move where the next read starts, as in any file."""
        start = self._size_of_all() if whence == io.SEEK_END else 0
        self.position = offset + (self.position if whence == io.SEEK_CUR else start)
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill as much of `buffer` as comes at once; 0 at the end."""
        data = self._read_range(self.position, self.position + len(buffer))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def is_url(text: str) -> bool:
    """Does fsspec have to be asked? A `file://` is a path."""
    return "://" in text and not text.startswith("file://")


def place(text: str) -> Place:
    """Return the place that a text stands for. Raises UserError for a URL that cannot be used.

    What people type is read by `shared.cli.paths.any_place`.
    """
    if not is_url(text):
        return Path(text.removeprefix("file://"))
    protocol, _, rest = text.partition("://")
    if not rest.strip("/"):
        raise UserError(
            f"{text} names no bucket; give an address such as {protocol}://bucket/cache"
        )
    with known_protocol(text):
        found = RemotePlace(text.rstrip("/"), use_listings_cache=False)
        assert found.fs
    return found
