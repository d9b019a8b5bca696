"""Other people's text, made fit to be shown or stored: captions, keys and paths may hold anything.

`visible` is for tables and pages, `on_one_line` for errors, `printable` for paths that have to stay
apart, `storable` for columns of text.
"""

from __future__ import annotations

import unicodedata

LONGEST = 280  # characters of a caption or key that are shown

# Besides control characters: what turns the reading direction, and halves of surrogate pairs.
HIDDEN = {"Cc", "Cs", "Zl", "Zp"}
BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str, longest: int = LONGEST) -> str:
    """Return `text` on one line, cut to `longest` characters, with what cannot be seen spelled out.

    A control character, a direction override or a lone surrogate becomes `[U+202E]`, so that it
    shows and can do nothing to the terminal or the page. HTML is left as it is: escape it.
    """
    cut = text if len(text) <= longest else text[: longest - 1] + "…"
    shown = []
    for character in cut:
        if character in "\t\n\r":
            shown.append(" ")
        elif character in BIDI or unicodedata.category(character) in HIDDEN:
            shown.append(f"[U+{ord(character):04X}]")
        else:
            shown.append(character)
    return "".join(shown)


def on_one_line(text: str) -> str:
    """Return `text` with line ends, control characters and lone surrogates spelled out."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def printable(path: str) -> str:
    """Return a path as text, with bytes that are not UTF-8 spelled out: unlike paths stay so."""
    return path.encode("utf-8", "backslashreplace").decode()


def storable(text: str) -> str:
    """Return text without lone surrogates, which JSON allows and no table takes."""
    return text.encode("utf-8", "replace").decode()
