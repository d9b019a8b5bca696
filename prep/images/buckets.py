"""Aspect ratio buckets: the sizes pictures are cropped to, all of about the same area."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from shared.errors import UserError

LATENT_STEP = 8  # what a side must be a multiple of
KOHYA_STEPS = 64
# Of the fields of Buckets, from the second on.
FLAGS = ("bucket_reso_steps", "min_bucket_reso", "max_bucket_reso", "bucket_no_upscale")

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Buckets:
    """The table of sizes around `resolution`², and the choice of one for a picture."""

    resolution: int
    steps: int  # every side is a multiple of it
    min_reso: int  # the shortest side there is
    max_reso: int  # the longest
    no_upscale: bool = False

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """The square, and for each width the largest height whose area is not above the square's.

        Both ways round, sorted.
        """
        square = self._floor(self.resolution)
        found = {(square, square)}
        first = -(-self.min_reso // self.steps) * self.steps
        for short in range(first, self.max_reso + 1, self.steps):
            long = self._floor(min(self.max_reso, self.resolution**2 // short))
            if long >= first:
                found |= {(short, long), (long, short)}
        return tuple(sorted(found))

    def choose(self, height: int, width: int) -> Size | None:
        """Choose the size of the aspect ratio nearest to the picture's; None where none may be had.

        With `no_upscale`, a picture that does not cover that size keeps its own, rounded down to
        `steps`, and one too small for the shortest side has none.
        """
        nearest = min(self.sizes, key=lambda size: (_mismatch(size, (height, width)), size))
        if not self.no_upscale or (height >= nearest[0] and width >= nearest[1]):
            return nearest
        short, long = sorted((self._floor(height), self._floor(width)))
        if short == 0 or short < self.min_reso:
            return None
        long = self._floor(min(long, self.max_reso, self.resolution**2 // short))
        return (short, long) if height <= width else (long, short)

    def _floor(self, side: int) -> int:
        return side // self.steps * self.steps

    def to_json(self) -> dict[str, int | bool]:
        """For the cache's identity, under the names of the flags."""
        return dict(zip(FLAGS, astuple(self)[1:], strict=True))

    @staticmethod
    def from_json(resolution: int, value: Mapping[str, Any]) -> Buckets:
        """Invert `to_json`."""
        return Buckets(resolution, *(value[flag] for flag in FLAGS))


def choose_buckets(
    resolution: int, steps: int | None, low: int | None, high: int | None, no_upscale: bool
) -> Buckets:
    """Take flags, else kohya's numbers for 512 pixels in proportion: 64, 256 and 1024.

    Raises UserError for numbers that make no table.
    """
    if steps is None:
        steps = min(KOHYA_STEPS, max(LATENT_STEP, resolution // 8 // LATENT_STEP * LATENT_STEP))
    low = resolution // 2 if low is None else low
    high = 2 * resolution if high is None else high
    if steps < LATENT_STEP or steps % LATENT_STEP:
        raise UserError(f"--bucket-reso-steps {steps} is not a multiple of {LATENT_STEP}")
    if steps > resolution:
        raise UserError(f"--bucket-reso-steps {steps} is above --resolution {resolution}")
    if not 0 < low <= resolution <= high:
        raise UserError(
            f"--min-bucket-reso {low}, --resolution {resolution} and --max-bucket-reso {high} "
            "must be in ascending order"
        )
    return Buckets(resolution, steps, low, high, no_upscale)


def _mismatch(a: Size, b: Size) -> Fraction:
    """Divide two aspect ratios, to 1 or more; exactly, so that ties are ties everywhere."""
    quotient = Fraction(a[0] * b[1], a[1] * b[0])
    return max(quotient, 1 / quotient)
