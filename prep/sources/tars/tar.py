"""Rows of a WebDataset tar, read strictly and in order: a cut is an error, never the end."""

from __future__ import annotations

import contextlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

import zstandard

from prep.files.litter import is_litter
from prep.files.remote import RemoteFile
from prep.files.stream import Command, LocalFile, decompressed
from prep.images.kinds import HEAD_BYTES, NO_PICTURE, no_picture_in, not_a_source
from prep.rows.row import (
    IMAGE_EXTENSIONS,
    LARGE_JSON,
    LONG_CAPTION,
    METADATA_EXTENSION,
    TEXT_BYTES,
    TOO_LARGE,
    Row,
    SourceError,
)
from prep.rows.unit import SourceOptions
from prep.sources.tars.tar_rows import CAPTION_FILES, Member, Together, row_of, split_name
from shared.errors import words_of

HEADER_BYTES = 1 << 20  # of a long name or of PAX keywords; more is damage or an attack
SAMPLE_BYTES = 4 << 20  # read of a tar, packed or not, to estimate its rows
SAMPLE_UNPACKED = 64 << 20  # or so much, of what it unpacks to
BUFFER_BYTES = 1 << 16
EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
Stream = LocalFile | RemoteFile | Command  # read in order, as often as one likes


class StrictInfo(tarfile.TarInfo):
    """Takes only a block of zeros for the end; tarfile also takes a cut or garbage for it."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> StrictInfo:
        """Read the next header. Raises ReadError unless it is one, or the end mark."""
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
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> StrictInfo:
        """One header's fields."""
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in EXTENDED and info.size > HEADER_BYTES):
            raise tarfile.ReadError(f"a header claims {info.size} bytes")
        return info


@dataclass(frozen=True)
class TarReader:
    """Reads a tar from wherever it lies."""

    stream: Stream
    size: int | None
    options: SourceOptions

    def rows(self) -> Iterator[Row]:
        """Consecutive files that share the name before the first dot, as in webdataset.

        Raises SourceError for damage, for a tar without any, and for one whose pictures and
        captions all lie apart.
        """
        found = Together()
        for key, files in self._groups():
            row = row_of(key, files, self.options)
            yield found.seen(row)
        found.check(self.stream.source, self.stream.remedy)

    def _groups(self) -> Iterator[tuple[str, dict[str, Member]]]:
        """Key and files by extension of each row."""
        key, files = "", dict[str, Member]()
        for name, member in self._members():
            stem, extension = split_name(name)
            if files and (stem != key or extension in files):
                yield key, files
                files = {}
            key = stem
            files[extension] = member
        if files:
            yield key, files

    def sample(self) -> tuple[int, int]:
        """Pictures by the headers: of a whole plain file, of the first bytes of anything else.

        With them the bytes of the source that they take, which in a packed tar are packed ones.
        """
        found = 0
        with contextlib.suppress(SourceError), self._open(seek=True) as (tar, packed):
            while (info := tar.next()) is not None:
                _forget_members(tar)
                read = info.offset if packed is None else packed.tell()
                enough = read > SAMPLE_BYTES or info.offset > SAMPLE_UNPACKED
                if enough and not self._seekable:
                    return found, read
                found += (
                    info.isfile()
                    and split_name(info.name)[1] in IMAGE_EXTENSIONS
                    and not is_litter(info.name)
                )
        return found, self.size or 0

    @property
    def _seekable(self) -> bool:
        return isinstance(self.stream, LocalFile) and self.stream.path.endswith(".tar")

    def _members(self) -> Iterator[tuple[str, Member]]:
        """Every regular file that is no litter. Raises SourceError where the tar is cut or none."""
        with self._open() as (tar, _):
            while (info := tar.next()) is not None:
                _forget_members(tar)
                if info.isfile() and split_name(info.name)[1] and not is_litter(info.name):
                    yield info.name, self._read(tar, info)
                _skip_to(tar, tar.offset)
            # The rest is read too: a command's exit status comes at its end.
            assert tar.fileobj is not None
            while rest := tar.fileobj.read(BUFFER_BYTES):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("it goes on after its end mark: several tars in one?")

    def _read(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
        """As much as its row needs: a file of unusual extension shows whether it is a picture."""
        extension = split_name(info.name)[1]
        picture = extension in IMAGE_EXTENSIONS
        text = extension in CAPTION_FILES or extension == METADATA_EXTENSION
        if not (picture or text) and "." in extension:  # a mask, a second view: not the picture
            return Member(b"")
        if info.issparse():
            return Member(b"", "sparse file", picture)
        most, too_large = self.options.max_image_bytes, TOO_LARGE
        if text:
            most = TEXT_BYTES
            too_large = LARGE_JSON if extension == METADATA_EXTENSION else LONG_CAPTION
        file = tar.extractfile(info)
        assert file is not None
        head = b""
        if not (picture or text):
            head = file.read(HEAD_BYTES)
            if problem := no_picture_in(head):
                return Member(b"", problem, problem != NO_PICTURE)
            picture = True
        if info.size > most:
            return Member(b"", too_large, picture)
        return Member(head + file.read(), "", picture)

    @contextlib.contextmanager
    def _open(self, seek: bool = False) -> Iterator[tuple[tarfile.TarFile, BinaryIO | None]]:
        """Open the tar, and the file that it is packed in, if it is."""
        head = b""
        try:
            with self.stream.open() as raw, decompressed(raw) as file:
                head = cast(io.BufferedReader, raw).peek(HEAD_BYTES)[:HEAD_BYTES]
                mode = "r:" if seek and self._seekable and file is raw else "r|"
                with tarfile.open(  # type: ignore[call-overload]
                    fileobj=file, mode=mode, tarinfo=StrictInfo, bufsize=BUFFER_BYTES
                ) as tar:
                    yield tar, None if file is raw else raw
        except (tarfile.TarError, EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
            if told := not_a_source(head, self.stream.remedy):
                raise SourceError(f"{self.stream.source} is not a whole tar but {told}") from None
            raise SourceError(
                f"{self.stream.source} is not a whole tar ({words_of(error)}); {self.stream.remedy}"
            ) from None


def _skip_to(tar: tarfile.TarFile, offset: int) -> None:
    """Read on to the next header. tarfile would go on long past the end of a stream."""
    assert tar.fileobj is not None
    while (left := offset - tar.fileobj.tell()) > 0:
        if not tar.fileobj.read(min(left, BUFFER_BYTES)):
            raise tarfile.ReadError("unexpected end of data")


def _forget_members(tar: tarfile.TarFile) -> None:
    """Keep memory flat: tarfile remembers every header it has read."""
    tar.members = []  # type: ignore[attr-defined]
