"""What a browser sends, checked: a form that is filled in otherwise than on the page is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.page.folders import is_inside
from shared.errors import UserError

PROMPT = 2000  # characters
FAR = 1e15  # an int may be too large for a float


def text(value: Any, name: str, longest: int = PROMPT) -> str:
    """A line of text, without blanks around it. Raises UserError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{name} is no text")
    if len(value) > longest:
        raise UserError(f"{name} has {len(value):,} characters; {longest:,} are read at the most")
    return value.strip()


def number(value: Any, name: str, low: float, high: float) -> float:
    """A finite number in a range. Raises UserError for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        raise UserError(f"{name} is no number; give one from {plain(low)} to {plain(high)}")
    if not low <= value <= high:
        asked = f"give a number from {plain(low)} to {plain(high)}"
        raise UserError(f"{name} is {plain(value)}; {asked}")
    return float(value)


def plain(value: float) -> str:
    """A number as people write it: 4,294,967,295, not 4.29497e+09."""
    return f"{value:,.12g}" if abs(value) < FAR else "beyond all bounds"


def whole(value: Any, name: str, low: int, high: int) -> int:
    """A whole number in a range. Raises UserError for anything else."""
    if number(value, name, low, high) != int(value):
        raise UserError(f"{name} is {plain(value)}; give a whole number")
    return int(value)


@dataclass(frozen=True)
class Upload:
    """A picture that a browser sent."""

    file: Path
    name: str  # as its user calls it


def upload(value: Any, name: str, folder: Path) -> Upload | None:
    """The file of an upload, None without one. Raises UserError for a file that is none."""
    if value is None:
        return None
    path = value.get("path") if isinstance(value, Mapping) else None
    if not isinstance(path, str) or "\0" in path or not is_inside(Path(path), folder):
        raise UserError(f"{name} is no file that was uploaded here")
    own = value.get("orig_name")
    return Upload(Path(path), own if isinstance(own, str) and own else Path(path).name)
