"""A unit of work: what commits as a whole, and how its rows are read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Protocol

from prep.rows.row import MAX_IMAGE_BYTES, Row
from shared.errors import UserError
from shared.sanitize import printable

NAME_BYTES = 100  # of a unit's name that come from its source; file names may have 255
UNIT_ROWS = 1024  # of a folder or table, about
UNSAFE = re.compile(r"[\\\x00-\x1f\x7f]")  # in names that go into SHA256SUMS
NUMBER = re.compile(r"-\d{1,9}(of\d{1,9})?$")  # of a unit among those of its source
SUFFIXES = (".tar", ".tar.zst", ".tar.gz", ".tgz", ".parquet", ".arrow")


@dataclass(frozen=True)
class SourceOptions:
    """The flags that say how sources are read; their help texts stand in `EncodeConfig`."""

    folder_units: int | None = None
    image_column: str | None = None
    caption_column: str | None = None
    caption_encoding: str | None = None
    key_column: str | None = None
    streaming: bool = False
    dataset_config_name: str | None = None
    max_image_bytes: int = MAX_IMAGE_BYTES
    allow_external_images: bool = False  # may rows name pictures outside of their data set?
    pipes: bool = False  # may `pipe:` run a shell? Only where the user typed it


class Reader(Protocol):
    """How a unit's rows are read. Readers hold no open handles: units go to other processes."""

    def rows(self) -> Iterator[Row]:
        """Read the rows in source order, occurrences not counted. Raises SourceError for damage."""

    def sample(self) -> tuple[int, int]:
        """Rows counted at little cost, and the bytes of the source that they take; 0 if unknown."""
        return 0, 0


@dataclass(frozen=True)
class Unit:
    """A piece of work that commits as a whole."""

    name: str  # of its commit record
    source: str  # the tar's or folder's path or URL, as typed
    state: Mapping[str, Any]  # changes when the source does
    reader: Reader = field(repr=False)
    rows_known: int | None = None
    size: int | None = None  # bytes, where rows must be estimated
    # Units that share a source and may share keys count their occurrences from different numbers.
    first_occurrence: int = 0

    def rows(self) -> Generator[Row, None, None]:
        """Read the rows in source order. Raises SourceError where the source is damaged."""
        seen: dict[str, int] = {}
        for row in self.reader.rows():
            occurrence = seen.get(row.key, self.first_occurrence)
            seen[row.key] = occurrence + 1
            yield replace(row, occurrence=occurrence) if occurrence else row


@dataclass
class Counted(Reader):
    """A reader that counts the rows it hands over."""

    reader: Reader
    handed: int = 0

    def rows(self) -> Iterator[Row]:
        """Read the reader's rows and count them."""
        for row in self.reader.rows():
            self.handed += 1
            yield row


def unit_name(basename: str, source: str) -> str:
    """Make a readable and unique file name: basename and 8 hex digits of the full source.

    Of a long basename the middle goes: its end may tell the source's units apart.
    """
    digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    readable = UNSAFE.sub("_", printable(basename))
    number = found[0] if (found := NUMBER.search(readable)) else ""
    start = readable.removesuffix(number).encode()[: NAME_BYTES - len(number)]
    return f"{start.decode(errors='ignore')}{number}-{digest}"


def stem(path: str) -> str:
    """Take the last part of a path without the ending that says what it is."""
    name = PurePosixPath(path).name
    ending = max((end for end in SUFFIXES if name.endswith(end)), key=len, default="")
    return name.removesuffix(ending)


def given_flags(options: SourceOptions, *others: str) -> dict[str, str]:
    """Collect the flags about captions, and others, that decide what rows say: for its state."""
    names = ("caption_column", "caption_encoding", *others)
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def count_units(options: SourceOptions, rows: int) -> int:
    """Choose how many units rows go to by hash. Raises UserError unless it is a power of two."""
    units = options.folder_units or 1 << max(0, -(-rows // UNIT_ROWS) - 1).bit_length()
    if units < 1 or units & (units - 1):
        raise UserError(f"--folder-units {units} is not a power of two")
    return units
