"""Rows of a WebDataset tar, read strictly and in order: a cut is an error, never the end."""

from __future__ import annotations

import contextlib
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import zstandard

from prep.rows import (
    IMAGE_EXTENSIONS,
    LARGE_JSON,
    LONG_CAPTION,
    TEXT_BYTES,
    TOO_LARGE,
    Row,
    SourceError,
    as_captions,
    captions_of,
    make_row,
)
from prep.streams import LocalFile, Stream, decompressed

CAPTION, METADATA = "txt", "json"
READ_EXTENSIONS = (*IMAGE_EXTENSIONS, CAPTION, METADATA)
JSON_WEIGHT = 50  # bytes of memory that a byte of json may take: an empty list does, for two
HEADER_BYTES = 1 << 20  # of a long name or of PAX keywords; more is damage or an attack
SAMPLE_BYTES = 4 << 20  # read of a tar, packed or not, to estimate its rows
SAMPLE_UNPACKED = 64 << 20  # or so much, of what it unpacks to
BUFFER_BYTES = 1 << 16
EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


class StrictInfo(tarfile.TarInfo):
    """Takes only a block of zeros for the end; tarfile also takes a cut or garbage for it."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> StrictInfo:
        """The next header. Raises ReadError unless it is one, or the end mark."""
        try:
            info = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"cut short or damaged at byte {tar.offset}: {error}") from None
        except (ValueError, LookupError, ArithmeticError, RecursionError) as error:
            # What tarfile raises for damaged PAX keywords and for headers nested without end.
            raise tarfile.ReadError(
                f"damaged at byte {tar.offset}: {type(error).__name__}"
            ) from None
        if info.size < 0:
            raise tarfile.ReadError(f"{info.name!a} has a negative size")
        return info

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> StrictInfo:
        """One header's fields."""
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in EXTENDED and info.size > HEADER_BYTES):
            raise tarfile.ReadError(f"a header claims {info.size} bytes")
        return info


@dataclass(frozen=True)
class Member:
    """A regular file of a tar; `problem` says why its content was not read."""

    name: str
    content: bytes
    problem: str = ""


@dataclass(frozen=True)
class TarReader:
    """Reads a tar from wherever it lies."""

    stream: Stream
    size: int | None
    max_image_bytes: int
    caption_column: str | None = None  # a key of the json; None: the txt, else the usual keys

    def rows(self) -> Iterator[Row]:
        """Consecutive files that share the name before the first dot, as in webdataset."""
        key, files = "", dict[str, Member]()
        empty = True
        for member in self._members():
            stem, extension = split_name(member.name)
            if not extension:
                continue
            if files and (stem != key or extension in files):
                yield _row(key, files, self.caption_column)
                files = {}
            key, empty = stem, False
            files[extension] = member
        if files:
            yield _row(key, files, self.caption_column)
        if empty:
            raise SourceError(
                f"{self.stream.source} holds no files of samples; {self.stream.remedy} or leave "
                "it out of --shards"
            )

    def sample(self) -> tuple[int, int]:
        """Pictures by the headers: of a whole plain file, of the first bytes of anything else.

        With them the bytes of the source that they take, which in a packed tar are packed ones.
        """
        found = 0
        with contextlib.suppress(SourceError), self._open(seek=True) as (tar, packed):
            while (info := tar.next()) is not None:
                tar.members = []
                read = info.offset if packed is None else packed.tell()
                enough = read > SAMPLE_BYTES or info.offset > SAMPLE_UNPACKED
                if enough and not self._seekable:
                    return found, read
                found += info.isfile() and split_name(info.name)[1] in IMAGE_EXTENSIONS
        return found, self.size or 0

    @property
    def _seekable(self) -> bool:
        return isinstance(self.stream, LocalFile) and self.stream.path.endswith(".tar")

    def _members(self) -> Iterator[Member]:
        """Every regular file. Raises SourceError where the tar is cut or is none."""
        with self._open() as (tar, _):
            while (info := tar.next()) is not None:
                tar.members = []  # tarfile would remember them all
                if info.isfile():
                    yield self._read(tar, info)
                _skip_to(tar, tar.offset)
            # The rest is read too: a command's exit status comes at its end.
            assert tar.fileobj is not None
            while rest := tar.fileobj.read(BUFFER_BYTES):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("it goes on after its end mark: several tars in one?")

    def _read(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
        extension = split_name(info.name)[1]
        if extension not in READ_EXTENSIONS:
            return Member(info.name, b"")
        if info.issparse():
            return Member(info.name, b"", "sparse file")
        text = {CAPTION: (TEXT_BYTES, LONG_CAPTION), METADATA: (TEXT_BYTES, LARGE_JSON)}
        most, problem = text.get(extension, (self.max_image_bytes, TOO_LARGE))
        if info.size > most:
            return Member(info.name, b"", problem)
        file = tar.extractfile(info)
        assert file is not None
        return Member(info.name, file.read())

    @contextlib.contextmanager
    def _open(self, seek: bool = False) -> Iterator[tuple[tarfile.TarFile, BinaryIO | None]]:
        """The tar, and the file that it is packed in, if it is."""
        try:
            with self.stream.open() as raw, decompressed(raw) as file:
                mode = "r:" if seek and self._seekable and file is raw else "r|"
                with tarfile.open(  # type: ignore[call-overload]
                    fileobj=file, mode=mode, tarinfo=StrictInfo, bufsize=BUFFER_BYTES
                ) as tar:
                    yield tar, None if file is raw else raw
        except (tarfile.TarError, EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
            words = " ".join(str(error).split()) or type(error).__name__
            raise SourceError(
                f"{self.stream.source} is not a whole tar ({words}); {self.stream.remedy}"
            ) from None


def _skip_to(tar: tarfile.TarFile, offset: int) -> None:
    """Read on to the next header. tarfile would go on long past the end of a stream."""
    assert tar.fileobj is not None
    while (left := offset - tar.fileobj.tell()) > 0:
        if not tar.fileobj.read(min(left, BUFFER_BYTES)):
            raise tarfile.ReadError("unexpected end of data")


def split_name(name: str) -> tuple[str, str]:
    """Key and extension: the extension begins at the first dot of the last part of the name.

    As in webdataset a file without either is no part of a sample: its extension is empty here.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem:
        return "", ""
    return folder + slash + stem, extension.lower()


def _row(key: str, files: Mapping[str, Member], column: str | None) -> Row:
    problem = next((member.problem for member in files.values() if member.problem), "")
    image = next((files[ext].content for ext in IMAGE_EXTENSIONS if ext in files), None)
    metadata: Mapping[str, Any] = {}
    weight = 0
    if METADATA in files:
        weight = JSON_WEIGHT * len(files[METADATA].content)
        try:
            loaded = json.loads(files[METADATA].content)
            metadata = loaded if isinstance(loaded, dict) else {}
        except (ValueError, RecursionError):
            metadata = {}  # the picture and its txt may still be good
    text = files[CAPTION].content.decode("utf-8-sig", "replace") if CAPTION in files else ""
    if column is None:
        captions = as_captions(text) or captions_of(metadata)
    else:
        captions = as_captions(metadata.get(column))
        if image is not None and not captions:
            problem = problem or f"no caption in {column!r} of its json"
    return make_row(key, None if problem else image, captions, metadata, problem, weight)
