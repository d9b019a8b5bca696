"""The row that some files of a tar are: which is the picture, which the caption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prep.images.kinds import NO_PICTURE
from prep.rows.character_encoding import UnreadableText, decode_text
from prep.rows.row import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    METADATA_EXTENSION,
    NO_CAPTION,
    Row,
    SourceError,
    as_captions,
    captions_of,
    make_row,
    record_in,
)
from prep.rows.unit import SourceOptions

CAPTION_FILES = tuple(  # extensions: NAME.txt, else NAME.jpg.txt, as in a folder
    f"{picture}{caption}"
    for picture in ("", *(f"{one}." for one in IMAGE_EXTENSIONS))
    for caption in CAPTION_EXTENSIONS
)
DOTTED = f"{NO_PICTURE} (its name has a dot: in a tar the extension begins at the first one)"
APART = f"{NO_PICTURE} (it stands elsewhere in the tar, not beside its caption)"
JSON_WEIGHT = 50  # bytes of memory that a byte of json may take: an empty list does, for two


@dataclass(frozen=True)
class Member:
    """A regular file of a tar; `problem` says why its content was not read, or is no picture."""

    content: bytes
    problem: str = ""
    is_picture: bool = False  # or stands where one should


def split_name(name: str) -> tuple[str, str]:
    """Key and extension: the extension begins at the first dot of the last part of the name.

    As in webdataset a file without either is no part of a sample: its extension is empty here.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem:
        return "", ""
    return folder + slash + stem, extension.lower()


def row_of(key: str, files: Mapping[str, Member], options: SourceOptions) -> Row:
    """Make the row of the files of one key, by their extensions."""
    picture, problem = _picture(files)
    metadata: Mapping[str, Any] = {}
    unread, weight = "", 0
    if (record := files.get(METADATA_EXTENSION)) is not None:
        weight = JSON_WEIGHT * len(record.content)
        metadata, unread = record_in(record.content, options.caption_encoding)
        problem = problem or record.problem
    text, unread_text = _text(files, options.caption_encoding)
    if column := options.caption_column:
        captions = as_captions(metadata.get(column))
        unread = unread or f"no caption in {column!r} of its json"
    elif unread_text:
        captions, unread = (), unread_text
    else:
        captions = as_captions(text) or captions_of(metadata)
    if picture is not None and not captions:
        problem = problem or unread
    return make_row(key, None if problem else picture, captions, metadata, problem, weight)


def _text(files: Mapping[str, Member], encoding: str | None) -> tuple[str, str]:
    """Read the text of the row's caption file, or say why it cannot be read."""
    found = next((one for one in CAPTION_FILES if one in files), "")
    if not found or files[found].problem:
        return "", files[found].problem if found else ""
    try:
        return decode_text(files[found].content, encoding), ""
    except UnreadableText as error:
        return "", f"its {found} is {error}"


def _picture(files: Mapping[str, Member]) -> tuple[bytes | None, str]:
    """Find the row's picture by extension, else by content; or why it has none, where known."""
    usual = next((files[one] for one in IMAGE_EXTENSIONS if one in files), None)
    others = [file for file in files.values() if file.is_picture]
    chosen = usual or next((file for file in others if not file.problem), next(iter(others), None))
    if chosen is not None:
        return (None, chosen.problem) if chosen.problem else (chosen.content, "")
    dotted = any(one.rpartition(".")[2] in IMAGE_EXTENSIONS for one in files)
    return None, DOTTED if dotted else ""


class Together:
    """Do the pictures of a tar lie beside their captions?"""

    def __init__(self) -> None:
        self.rows = self.whole = self.apart = 0
        self.alone: dict[str, bool] = {}  # of keys with one of both: is it the picture?
        self.example = ""

    def seen(self, row: Row) -> Row:
        """Join the row with what is known of its other half."""
        self.rows += 1
        picture, captions = row.image is not None, bool(row.captions)
        if not row.problem:
            self.whole += 1
            return row
        half = row.problem in (NO_PICTURE, NO_CAPTION)
        if half and self.alone.setdefault(row.key, picture) is not picture:
            self.apart += 1
            self.example = row.key
            if captions:
                return replace(row, problem=APART)
        return row

    def check(self, source: str, remedy: str) -> None:
        """Raise SourceError for a tar that nothing can be made of as it is."""
        if not self.rows:
            raise SourceError(
                f"{source} holds no files of samples; {remedy} or leave it out of --shards"
            )
        if self.apart and not self.whole:
            raise SourceError(
                f"{source}: pictures and captions do not lie beside each other, such as those of "
                f"{self.example!r}; pack it in the order of names: tar --sort=name -cf NEW.tar "
                "-C FOLDER ."
            )
