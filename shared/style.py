"""LoRAs that a teacher wears: `FILE[:SCALE]` as it is typed, and what that names."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shared.errors import UserError
from shared.storage.files import file_sha256

FLAG = "--teacher-lora"


@dataclass(frozen=True)
class Style:
    """A LoRA file and the factor with which its weights are added."""

    file: str  # where it was; it may lie elsewhere now
    scale: float
    sha256: str  # of the file

    @property
    def mark(self) -> str:
        """Tell it from others, wherever it lies."""
        return f"{self.sha256[:16]}:{self.scale:g}"

    def __str__(self) -> str:
        return f"{Path(self.file).name} at {self.scale:g} ({self.sha256[:16]})"


def split_scale(text: str) -> tuple[str, float]:
    """Divide `FILE[:SCALE]`; the scale is 1 unless given, and a file of the whole name is a file.

    Raises UserError for a scale that does nothing, and behind a file's name for one that is no
    number.
    """
    file, colon, number = text.rpartition(":")
    if not colon or not file or os.path.lexists(text):
        return text, 1.0
    try:
        scale = float(number)
    except ValueError:
        if os.path.lexists(file):
            why = f"{number!r} is no number; give a scale, such as 0.8"
            raise UserError(f"{text!r}: {why}") from None
        return text, 1.0  # a colon of the file's own name
    if not math.isfinite(scale) or not scale:
        raise UserError(f"{text!r}: a scale of {number} cannot be; give another, such as 0.8")
    return file, scale


def join_scale(file: str, scale: float) -> str:
    """Undo `split_scale`."""
    return f"{file}:{scale!r}" if scale != 1 or split_scale(file)[0] != file else file


def open_styles(texts: Sequence[str]) -> tuple[Style, ...]:
    """Read what the files are. Raises UserError for one that is not there, or no weights' file."""
    found = []
    for text in texts:
        file, scale = split_scale(text)
        path = Path(file)
        if path.is_dir():
            raise UserError(f"{FLAG} {file} is a folder; give the .safetensors file in it")
        if not path.is_file():
            raise UserError(
                f"{FLAG} {file}: there is no such file; give a LoRA's (`hf download` fetches one "
                "of the hub)"
            )
        if path.suffix != ".safetensors":
            raise UserError(f"{FLAG} {file} is no .safetensors file, which is what is read")
        found.append(Style(file, scale, content_hash(path)))
    return tuple(found)


def content_hash(path: Path) -> str:
    """A file's sha256, computed once for as long as the file stays as it is."""
    stat = path.stat()
    return _content_hash(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@cache
def _content_hash(path: Path, *_state: int) -> str:
    return file_sha256(path)


def as_recorded(styles: Sequence[Style]) -> tuple[Style, ...]:
    """Return them as they are there. Raises UserError where a file is gone, or another by now."""
    found = open_styles([join_scale(style.file, style.scale) for style in styles])
    for style, now in zip(styles, found, strict=True):
        if style.sha256 != now.sha256:
            raise UserError(
                f"{style.file} is another file than the answers' teacher wore ({now.sha256[:16]}, "
                f"not {style.sha256[:16]}); restore it"
            )
    return found


def marks(styles: Sequence[Style]) -> list[str]:
    """Tell styles from others, in their order."""
    return [style.mark for style in styles]


def described(styles: Sequence[Style]) -> str:
    """Name styles in a message."""
    return ", ".join(map(str, styles)) or "no LoRA"


def as_typed(styles: Sequence[Style]) -> str:
    """Return the flags that give these styles, as far as their files lie where they were."""
    return " ".join(f"{FLAG} {join_scale(style.file, style.scale)}" for style in styles)
