"""What a table's cell holds of a picture: its bytes in one of many guises, or where they are."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from prep.images.kinds import HEAD_BYTES, kind_of

SEVERAL = "several pictures in a row"
NO_BYTES = "a list of numbers that are no bytes"
BASE64 = re.compile(r"[A-Za-z0-9+/_-][A-Za-z0-9+/_\s-]{63,}={0,2}\s*")


@dataclass(frozen=True)
class Cell:
    """A picture's bytes, or the name they are to be had by; `problem` where it is neither."""

    data: bytes | None = None
    name: str | None = None
    problem: str = ""


def cell_of(value: Any) -> Cell:
    """Bytes, a struct of `bytes` and `path`, a list of bytes' values, base64, a data URI, a name.

    A list of pictures is a picture where it has one.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return Cell(bytes(value))
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        inner, path = cell_of(value.get("bytes")), value.get("path")
        name = path if isinstance(path, str) and path else inner.name
        return Cell(inner.data, name, inner.problem)
    if isinstance(value, list | tuple):
        return _list(value)
    return Cell()


def _list(values: list[Any] | tuple[Any, ...]) -> Cell:
    if values and all(type(one) is int for one in values):
        try:
            return Cell(bytes(value % 256 if -128 <= value < 0 else value for value in values))
        except ValueError:
            return Cell(problem=NO_BYTES)
    there = [one for one in values if one is not None]
    if len(there) > 1:
        return Cell(problem=SEVERAL)
    return cell_of(there[0]) if there else Cell()


def _text(text: str) -> Cell:
    """Take text for a name, unless it is a picture written as text."""
    if text[:5].lower() == "data:":
        mime, comma, content = text.partition(",")
        if not comma:
            return Cell(problem="a data URI without data")
        if mime.lower().endswith(";base64"):
            data = _base64(unquote_to_bytes(content).decode("ascii", "replace"))
            return Cell(data) if data else Cell(problem="a data URI that is not base64")
        return Cell(unquote_to_bytes(content))
    if BASE64.fullmatch(text) and (data := _base64(text)):
        kind = kind_of(data[:HEAD_BYTES])
        if kind is not None and kind.is_picture:
            return Cell(data)
    return Cell(name=text) if text.strip() else Cell()


def _base64(text: str) -> bytes | None:
    letters = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
