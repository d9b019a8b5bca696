"""Which rows the user does not want: told from their metadata, or too small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prep.filters.where import Where, lookup

PWATERMARK = "pwatermark above"
WHERE = "where"
TOO_SMALL = "smaller than"  # --min-size or --min-bucket-reso, said by `Framing`


@dataclass(frozen=True)
class Filters:
    """`--where` and `--max-pwatermark`. Raises UserError where they cannot be understood."""

    where: str | None = None
    max_pwatermark: float | None = None

    def __post_init__(self) -> None:
        _ = self._predicate

    @cached_property
    def _predicate(self) -> Where | None:
        return None if self.where is None else Where(self.where)

    def reason(self, metadata: Mapping[str, Any]) -> str:
        """Why the row is not wanted, or an empty string. A row that lacks the key is wanted."""
        if self.max_pwatermark is not None:
            value = lookup(metadata, "pwatermark")
            if isinstance(value, int | float) and value > self.max_pwatermark:
                return f"{PWATERMARK} {self.max_pwatermark:g}"
        if self._predicate is not None and not self._predicate.keeps(metadata):
            return WHERE
        return ""


def is_filter(reason: str) -> bool:
    """Did the user ask for this rejection? Then it says nothing about damage to the source."""
    return reason == WHERE or reason.startswith((PWATERMARK, TOO_SMALL))
