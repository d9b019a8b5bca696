"""Bytes of captions and metadata to text, by one rule for every source."""

from __future__ import annotations

import codecs
import json
import unicodedata

from shared.errors import UserError

UTF8 = "utf-8"
# The longer marks first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, UTF8), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
_SHOW_NOTHING = frozenset(("Cc", "Cf", "Cs", "Zs", "Zl", "Zp"))  # Unicode's general categories
# Letters and marks by category, but nothing to see: Unicode's other default ignorable code points,
# and the empty Braille pattern.
_FILLERS = frozenset(
    map(chr, (0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800,
              0x3164, 0xFFA0, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
)  # fmt: skip


class UnreadableText(Exception):
    """Which text the bytes are not, and what to do about it, in a few words."""


def decode_text(data: bytes, encoding: str | None = None) -> str:
    """Decode text: a byte order mark decides, else `encoding`, else it is UTF-8.

    Raises UnreadableText where it is not, also for UTF-16 without a mark, which is UTF-8 by
    chance.
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            return _decoded(data[len(mark) :], name)
    if not _is_wide(encoding) and (wide := _wide(data)):
        raise UnreadableText(
            f"UTF-16 without a byte order mark; save as UTF-8 or say --caption-encoding {wide}"
        )
    return _decoded(data, encoding or UTF8)


def decode_json_text(data: bytes, encoding: str | None = None) -> str:
    """As `decode_text`, but JSON is Unicode by itself: `encoding` is for what cannot be that.

    Of UTF-16 and UTF-32 without a mark the first character tells.
    """
    try:
        return decode_text(data, json.detect_encoding(data) if _wide(data) else None)
    except UnreadableText:
        if encoding is None:
            raise
        return decode_text(data, encoding)


def check_encoding(name: str) -> None:
    """Raise UserError unless Python has a text encoding of this name."""
    try:
        b"".decode(name)
        known = isinstance("".encode(name), bytes) and codecs.lookup(name).name not in _NO_TEXT
    except (LookupError, ValueError):
        known = False
    if not known:
        raise UserError(
            f"--caption-encoding {name!r}: no such encoding; for example cp1252 (Western Europe), "
            "cp1251 (Cyrillic), cp932 or shift_jis, gb18030, big5, euc-kr, utf-16-le"
        )


_NO_TEXT = frozenset(("idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape"))


def is_blank(text: str) -> bool:
    """Does the text show nothing: only blanks, marks of direction, fillers and the like?"""
    return all(
        character in _FILLERS or unicodedata.category(character) in _SHOW_NOTHING
        for character in text
    )


def _decoded(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeError:
        if encoding == UTF8:
            reason = "not UTF-8; save as UTF-8, or say --caption-encoding cp1252 or what it is"
        else:
            reason = f"not {encoding}; save as UTF-8"
        raise UnreadableText(reason) from None


def _is_wide(encoding: str | None) -> bool:
    return encoding is not None and codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def _wide(data: bytes) -> str:
    """Which UTF-16 it is, by a NUL on one side in every fourth pair of bytes; or nothing."""
    pairs = len(data) // 2
    if not pairs or len(data) % 2:
        return ""
    big, little = data[::2].count(0), data[1::2].count(0)
    return ("utf-16-be" if big > little else "utf-16-le") if 4 * max(big, little) >= pairs else ""
