"""Lines that the page shows: everything in them that others wrote is text."""

from __future__ import annotations

import sys
import traceback

from markupsafe import Markup

from shared.errors import UserError, exhausted, system_error, words_of
from shared.sanitize import visible

LONGEST = 600  # characters of a line


def note(text: str) -> str:
    """A line under the buttons; with no text an empty one, which keeps its place."""
    return line("note", text)


def bad(text: str) -> str:
    """A line that says what went wrong."""
    return line("note bad", text)


def line(kind: str, text: str) -> str:
    """A paragraph of one of page.css's classes."""
    shown = visible(text, LONGEST)
    return str(Markup('<p class="{}" role="status">{}</p>').format(kind, shown))


def figure(number: str, text: str) -> str:
    """A number that people look for, and what it is about."""
    shown = Markup('<p class="how"><b>{}</b> {}</p>')
    return str(shown.format(visible(number), visible(text, LONGEST)))


def refusal(error: Exception) -> str:
    """Why something did not work, in a line; what nobody foresaw is told in the terminal, too."""
    if isinstance(error, UserError):
        return bad(str(error))
    if isinstance(error, OSError):
        return bad(system_error(error))
    if what := exhausted(error):
        return bad(f"{what}; close what else uses it, or choose a smaller model")
    traceback.print_exception(error, file=sys.stderr)
    return bad(f"that failed: {words_of(error)}; the terminal has more")
