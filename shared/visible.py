"""Other people's text, made fit to be shown: captions, keys and paths may hold anything."""

from __future__ import annotations

import unicodedata

LONGEST = 280  # characters of a caption or key that are shown

# Besides control characters: what turns the reading direction, and halves of surrogate pairs.
HIDDEN = {"Cc", "Cs", "Zl", "Zp"}
BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str, longest: int = LONGEST) -> str:
    """`text` on one line, cut to `longest` characters, with what cannot be seen spelled out.

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


def share_of(part: float, whole: float) -> str:
    """`12.5%`; something never reads as nothing, nor nearly all as all."""
    if not whole or not part:
        return "0%"
    percent = 100 * part / whole
    if percent < 0.1:
        return "<0.1%"
    if 99.9 < percent < 100:
        return ">99.9%"
    return f"{percent:.1f}%" if percent < 99.95 else "100%"
