"""Files that fsspec reaches: which there are, and reading them in spite of a bad connection."""

from __future__ import annotations

import glob
import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, BinaryIO, ClassVar, TypeVar
from urllib.parse import urlsplit

import fsspec

from prep.files.addresses import strayed
from prep.files.library_errors import is_failure
from prep.rows.row import SourceError
from shared.errors import UserError
from shared.storage.errors import cause_of, known_protocol, status_of, without_password
from shared.storage.retry import TRIES, with_retries, worth_another_try
from shared.storage.urls import RangedFile

T = TypeVar("T")

BLOCK_BYTES = 8 << 20  # of a ranged read; the next block is fetched while one is read
BLOCKS_KEPT = 4
LOOKUPS = 16  # at a time
LISTED = 64  # names in one folder from which on listing the folder is quicker than asking for each
VERSIONS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "Last-Modified", "last_modified",
            "created")  # fmt: skip


@dataclass(frozen=True)
class RemoteFile:
    """A file by its URL."""

    url: str
    remedy: ClassVar[str] = "upload it again"

    @property
    def source(self) -> str:
        """The URL without a password in it."""
        return without_password(self.url)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Yield the bytes, as a file that can be read in order and sought in."""
        with RetryingFile(self.url) as raw, io.BufferedReader(raw, 1 << 16) as file:
            yield file


@dataclass(frozen=True)
class Found:
    """A remote file, its size (None if unknown) and what tells it from a changed one."""

    url: str
    size: int | None
    state: Mapping[str, Any]


def find_remote(patterns: Sequence[str]) -> list[Found]:
    """Find what URLs and globs of URLs stand for. Raises UserError for whatever is not there."""
    found: list[tuple[str, Mapping[str, Any] | None]] = []
    for pattern in patterns:
        found += _glob(pattern) if _has_magic(pattern) else [(pattern, None)]
    unknown = [url for url, info in found if info is None]
    infos = dict(zip(unknown, _infos(unknown), strict=True))
    return [_found(url, info or infos[url]) for url, info in found]


def _found(url: str, info: Mapping[str, Any]) -> Found:
    if info.get("type") == "directory":
        raise UserError(f"--shards: {url} is a folder; name its files, such as {url}/*.tar")
    size = info.get("size")
    if size == 0:
        raise UserError(f"{url} is empty; upload it again or leave it out of --shards")
    version = next((info[name] for name in VERSIONS if info.get(name)), None)
    if isinstance(version, datetime):  # which a listing may give as a number
        version = version.timestamp()
    return Found(url, size, {"size": size, "version": version and str(version)})


def _has_magic(url: str) -> bool:
    """Is it a glob? A question mark in an http address begins its query."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        return "*" in parts.path or "[" in parts.path
    return glob.has_magic(url)


def _glob(pattern: str) -> list[tuple[str, Mapping[str, Any] | None]]:
    filesystem, path = _filesystem(pattern)
    try:
        infos = with_retries(lambda: filesystem.glob(path, detail=True))
    except Exception as error:  # each file system raises what its library does
        if not is_failure(error):
            raise
        raise UserError(f"--shards: {pattern!r} cannot be listed ({cause_of(error)})") from None
    if not infos:
        raise UserError(f"--shards: nothing matches {pattern!r}; check the address")
    return [
        # An http listing is a page of links, which says nothing of sizes and versions.
        (filesystem.unstrip_protocol(name), None if info.get("size") is None else info)
        for name, info in sorted(infos.items())
    ]


def _infos(urls: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return the details of each URL: by folder where many lie together, else several at a time."""
    known: dict[str, Mapping[str, Any]] = {}
    folders = defaultdict(list)
    for url in urls:
        folders[url.rpartition("/")[0]].append(url)
    for folder, members in folders.items():
        if len(members) >= LISTED and urlsplit(folder).scheme not in ("http", "https"):
            filesystem, path = _filesystem(folder)
            try:
                infos = with_retries(partial(filesystem.ls, path, detail=True))
            except Exception as error:  # a folder that may be read but not listed
                if not is_failure(error):
                    raise
                continue
            listed = {info["name"]: info for info in infos}
            names = {url: filesystem._strip_protocol(url) for url in members}
            known |= {url: listed[name] for url, name in names.items() if name in listed}
    with ThreadPoolExecutor(LOOKUPS, thread_name_prefix="lookup") as pool:
        return list(pool.map(lambda url: known.get(url) or _info(url), urls))


def _info(url: str) -> Mapping[str, Any]:
    filesystem, path = _filesystem(url)
    try:
        return dict(with_retries(lambda: filesystem.info(path)))
    except Exception as error:
        if not is_failure(error):
            raise
        raise UserError(
            f"--shards: {RemoteFile(url).source} cannot be read ({cause_of(error)}); "
            "check the address and your access to it"
        ) from None


def _filesystem(url: str, options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    with known_protocol(url, "--shards"):
        filesystem, path = fsspec.url_to_fs(url, **(options or {}))
    return filesystem, path


class Unreadable(SourceError):
    """A file that cannot be read: `why` in a word or two; `strayed` where a server sent us away."""

    def __init__(self, url: str, error: BaseException, tries: int) -> None:
        tried = f", {tries} times" if tries > 1 else ""
        super().__init__(
            f"{RemoteFile(url).source} cannot be read ({cause_of(error)}{tried}); run the same "
            "command again when it can"
        )
        status = status_of(error)
        self.why = f"HTTP {status}" if status else type(error.__cause__ or error).__name__
        self.strayed = strayed(error)


class RetryingFile(RangedFile):
    """A remote file that is opened again where reading it broke off.

    Raises Unreadable, naming URL and cause, when `tries` attempts in a row have failed.
    """

    def __init__(
        self, url: str, tries: int = TRIES, options: Mapping[str, Any] | None = None,
        ranges: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(self.read_range, self.size)
        self.url, self.tries, self.options = url, tries, options
        self._file: Any = None
        self._at = 0  # where the open file stands
        self._size: int | None = None
        self._ranges = ranges  # until the server turns out not to know them

    def size(self) -> int:
        """Return the file's bytes, as the server says. Raises Unreadable."""
        self._attempt(lambda: self._open(self.position))
        assert self._size is not None, self.url
        return self._size

    def read_range(self, start: int, end: int) -> bytes:
        """Return bytes from `start` on, `end` at most. Raises Unreadable."""
        return self._attempt(lambda: self._read(start, end - start))

    def close(self) -> None:
        """Let go of the connection."""
        self._drop()
        super().close()

    def _read(self, start: int, count: int) -> bytes:
        self._open(start)
        data = bytes(self._file.read(count))
        if not data and self._size is not None and start < self._size:
            raise OSError(f"ended after {start} of {self._size} bytes")
        self._at += len(data)
        return data

    def _attempt(self, act: Callable[[], T]) -> T:
        try:
            return with_retries(lambda: self._once(act), self.tries)
        except UserError:  # an address that cannot be used
            raise
        except Exception as error:
            if not is_failure(error):
                raise
            tries = self.tries if worth_another_try(error) else 1
            raise Unreadable(self.url, error, tries) from None

    def _once(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except Exception as error:  # each file system raises what its library does
            self._drop()
            if not (isinstance(error, ValueError) and self._ranges and is_failure(error)):
                raise
        self._ranges = False  # the answer was the whole file, not the range
        return self._once(act)

    def _open(self, start: int) -> None:
        """Let the file stand at `start`."""
        if self._file is not None and start != self._at:
            if self._ranges:
                self._file.seek(start)
            else:
                self._drop()
        self._at = start
        if self._file is not None:
            return
        filesystem, path = _filesystem(self.url, self.options)
        if self._ranges:
            self._file = filesystem.open(
                path, "rb", block_size=BLOCK_BYTES, cache_type="background",
                cache_options={"maxblocks": BLOCKS_KEPT},
            )  # fmt: skip
            self._file.seek(start)
        else:
            self._file = filesystem.open(path, "rb", block_size=0)
            left = start
            while left and (skipped := self._file.read(min(left, BLOCK_BYTES))):
                left -= len(skipped)
        self._size = getattr(self._file, "size", None)

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
