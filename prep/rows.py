"""What a row of any source looks like before it is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
CAPTION_KEYS = ("caption", "text", "TEXT", "prompt", "captions")

# Key, picture, captions, metadata, and why the row cannot be used, if so.
RawRow = tuple[str, bytes | None, tuple[str, ...], Mapping[str, Any], str]


class SourceError(UserError):
    """A damaged source: its unit cannot be encoded, the others can."""


def checked_row(
    key: str, image: bytes | None, captions: tuple[str, ...], metadata: Mapping[str, Any]
) -> RawRow:
    """The row, with its problem if it lacks a picture or a caption."""
    problem = ""
    if image is None:
        problem = "no picture"
    elif not captions:
        problem = "no caption"
    return key, image, captions, metadata, problem


def captions_of(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions under the first key that has any."""
    for name in CAPTION_KEYS:  # lone surrogates, which JSON allows, are no text
        value = metadata.get(name)
        if isinstance(value, str) and value.strip():
            return (_text(value),)
        if isinstance(value, list):
            return tuple(_text(text) for text in value if isinstance(text, str) and text.strip())
    return ()


def _text(value: str) -> str:
    return value.strip().encode("utf-8", "replace").decode()
