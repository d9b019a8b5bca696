"""What a row of any source looks like before it is decoded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prep.images.kinds import NO_PICTURE
from prep.rows.character_encoding import UnreadableText, decode_json_text, is_blank
from shared.errors import UserError
from shared.sanitize import storable

# Usual ones of pictures that are read, which is told by content; the first that a row has counts.
IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "jpe", "jfif", "mpo", "apng", "avif",
    "heic", "heif", "hif", "jp2", "j2k", "jpf", "jpx", "j2c", "jpc", "tga", "ppm", "pgm", "pbm",
    "pnm", "qoi", "dds",
)  # fmt: skip
CAPTION_EXTENSIONS = ("txt", "caption")  # beside a picture; the first that it has counts
METADATA_EXTENSION = "json"
CAPTION_KEYS = ("caption", "text", "TEXT", "prompt", "captions", "CAPTION")
NO_CAPTION = "no caption"
TOO_LARGE = "larger than --max-image-bytes"
MAX_IMAGE_BYTES = 256_000_000  # unless told: 40 megapixels in uncompressed 16-bit colours
MAX_CAPTION = 100_000  # characters, of which an encoder reads some 300
LONG_CAPTION = f"caption longer than {MAX_CAPTION:,} characters"
TEXT_BYTES = 1_000_000  # of a txt or a json
LARGE_JSON = f"json larger than {TEXT_BYTES // 1_000_000} MB"


class SourceError(UserError):
    """A damaged source: its unit cannot be encoded, the others can."""


@dataclass(frozen=True)
class Row:
    """One input row: a picture's bytes and what is said about it."""

    key: str
    occurrence: int  # 0 for the first row of this key in its unit, then 1, ...
    image: bytes | None  # None where the row has no picture
    captions: tuple[str, ...]
    metadata: Mapping[str, Any]
    problem: str = ""  # why the row cannot be used, found while reading
    weight: int = 0  # bytes of memory until it is decoded, about

    def unburdened(self) -> Row:
        """Drop what nobody needs once the row is decoded: all but key, captions and url."""
        url = {"url": str(self.metadata["url"])} if "url" in self.metadata else {}
        return replace(self, image=None, metadata=url)


def make_row(
    key: str,
    image: bytes | None,
    captions: tuple[str, ...],
    metadata: Mapping[str, Any],
    problem: str = "",
    metadata_weight: int = 0,
) -> Row:
    """Make a row, with its problem if it lacks a picture or a caption or has an endless one."""
    if any(len(caption) > MAX_CAPTION for caption in captions):
        captions, problem = (), problem or LONG_CAPTION
    if not problem and image is None:
        problem = NO_PICTURE
    elif not problem and not captions:
        problem = NO_CAPTION
    weight = len(image or b"") + sum(map(len, captions)) + metadata_weight
    return Row(key, 0, image, captions, metadata, problem, weight)


def captions_of(metadata: Mapping[str, Any], column: str | None = None) -> tuple[str, ...]:
    """Take the captions under `column`, else under the first of the usual keys that has any."""
    for name in (column,) if column else CAPTION_KEYS:
        if found := as_captions(metadata.get(name)):
            return found
    return ()


def record_in(content: bytes, encoding: str | None) -> tuple[Mapping[str, Any], str]:
    """Read the object in a json, or say why it cannot be read; one that is no JSON says nothing."""
    try:
        value = json.loads(decode_json_text(content, encoding))
    except UnreadableText as error:
        return {}, f"its json is {error}"
    except (ValueError, RecursionError):
        return {}, ""
    return (value, "") if isinstance(value, dict) else ({}, "")


def as_captions(value: Any) -> tuple[str, ...]:
    """Take a string, or the strings of a list, without blanks around them.

    Those that show nothing (blanks, marks of width and direction) are none.
    """
    values = value if isinstance(value, list | tuple) else [value]
    texts = (text for text in values if isinstance(text, str) and not is_blank(text))
    return tuple(storable(text.strip()) for text in texts)
