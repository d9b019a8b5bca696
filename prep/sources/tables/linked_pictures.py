"""Pictures that a table's rows name instead of holding them, kept to the data set that names them.

A row was written by somebody else: its paths lead nowhere but into the data set's own folder, and
its URLs to no other host or bucket than the table's own, also by way of links, redirects and
archives, unless the user says --allow-external-images. Whatever is wrong with such a picture
costs its row and nothing else.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prep.files.addresses import WEB, origin, web_options
from prep.files.remote import RetryingFile, Unreadable
from prep.files.stream import LocalFile
from shared.errors import UserError

OUTSIDE = "picture outside the data set, see --allow-external-images"
MISSING = "file missing"
UNREACHABLE = "picture cannot be fetched"

TRIES = 3  # of one picture among many
# Where pictures lie behind an address of their own: no cache, shell, or service among them.
FETCHED = {*WEB, "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "ftp"}
# What `zip://member::ADDRESS` may begin with: its file lies at ADDRESS, whatever the member's name.
ARCHIVES = {"zip", "tar", "gzip", "bz2", "xz", "lz4", "zstd"}
SNAPSHOT = re.compile(r"(.*/(?:datasets|models)--[^/]+)/snapshots/[^/]+(?:/.*)?")


@dataclass(frozen=True)
class Home:
    """Where a data set's pictures may lie, and those that its rows name relative to it."""

    folders: tuple[str, ...] = ()  # real paths; relative names begin at the first
    url: str = ""  # of the table, or of the folder it is in
    anywhere: bool = False  # --allow-external-images

    def picture(self, name: str, most: int) -> tuple[bytes | None, str]:
        """Read the named picture's bytes, up to `most` and one more, or say why there are none."""
        name = name.removeprefix("file://")
        if "://" in name or "::" in name:
            return self._fetched(name, most)
        if self.url and not os.path.isabs(name):
            folder = self.url.partition("?")[0].rpartition("/")[0]
            return self._fetched(f"{folder}/{name}", most)
        return self._read(name, most)

    def _read(self, name: str, most: int) -> tuple[bytes | None, str]:
        try:
            path = os.path.realpath(os.path.join(*self.folders[:1], name))
            if not (self.anywhere or self._holds(path)):
                return None, OUTSIDE
            if not os.path.isfile(path):  # reading a pipe would wait for ever
                return None, MISSING
            with LocalFile(path).open() as file:
                return file.read(most + 1), ""
        except (OSError, ValueError):  # such as a name that is too long, or has a zero in it
            return None, MISSING

    def _holds(self, path: str) -> bool:
        return any(Path(path).is_relative_to(folder) for folder in self.folders)

    def _fetched(self, url: str, most: int) -> tuple[bytes | None, str]:
        *archives, last = url.split("::")
        if not (self.anywhere or self._may_ask(archives, last)):
            return None, OUTSIDE
        protocol = last.partition("://")[0]
        own = bool(self.url) and protocol == self.url.partition("://")[0]
        if "://" in last and protocol not in FETCHED and not own:
            return None, f"{UNREACHABLE} ({protocol}://)"
        try:
            return _read_url(url, most + 1, stay=not self.anywhere), ""
        except Unreadable as error:
            return None, OUTSIDE if error.strayed else f"{UNREACHABLE} ({error.why})"
        except UserError:  # an address that fsspec cannot make sense of, or has no package for
            return None, f"{UNREACHABLE} ({protocol}://)"

    def _may_ask(self, archives: Iterable[str], last: str) -> bool:
        if any(part.partition("://")[0] not in ARCHIVES for part in archives):
            return False
        if "://" not in last:
            return self._holds(os.path.realpath(os.path.join(*self.folders[:1], last)))
        own = origin(self.url)
        return bool(self.url) and own is not None and origin(last) == own


def home_of(path: str) -> Home:
    """Make the home of a table at a local path, or of a folder of them."""
    return Home(local_folders(path if os.path.isdir(path) else os.path.dirname(path)))


def local_folders(*folders: str) -> tuple[str, ...]:
    """Their real paths; a snapshot of the hub's cache is links to files of the whole repository."""
    real = [os.path.realpath(folder or ".") for folder in folders]
    repositories = [found[1] for folder in real if (found := SNAPSHOT.fullmatch(folder))]
    return (*real, *repositories)


def _read_url(url: str, most: int, stay: bool) -> bytes:
    """Fetch an address. Raises Unreadable, or UserError for one that cannot be used."""
    protocol = url.rpartition("::")[2].partition("://")[0]
    web = protocol in WEB  # where a whole file is one request, and a range is two
    options = {protocol: dict(web_options(stay))} if web else {}
    with (
        RetryingFile(url, TRIES, options, ranges=not web) as raw,
        io.BufferedReader(raw, 1 << 16) as file,
    ):
        return file.read(most)
