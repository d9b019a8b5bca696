"""Several orders of a caption's tags, as several captions of a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 4  # for each order that is wanted, at most: some come up twice


@dataclass(frozen=True)
class Shuffle:
    """`--shuffle-caption`: the first `keep_tokens` tags stay in place, the others are shuffled."""

    separator: str = ","
    keep_tokens: int = 0
    seed: int = 0

    def captions(self, captions: Sequence[str], image_sha256: str, count: int) -> tuple[str, ...]:
        """Up to `count` captions in orders of their own, of several captions in turns.

        A pure function of captions and picture, whatever the row is called. There are fewer where
        the captions have not so many orders, or chance hides one.
        """
        found: dict[str, None] = {}
        for number in range(DRAWS * count if captions else 0):
            found[self._order(captions[number % len(captions)], image_sha256, number)] = None
            if len(found) == count:
                break
        return tuple(found)

    def _order(self, caption: str, image_sha256: str, number: int) -> str:
        tags = [tag for part in caption.split(self.separator) if (tag := part.strip())]
        kept, others = tags[: self.keep_tokens], tags[self.keep_tokens :]
        drawn = f"{self.seed}\0{image_sha256}\0{number}\0{caption}"
        digest = hashlib.blake2b(drawn.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        order = np.random.default_rng(int.from_bytes(digest, "little")).permutation(len(others))
        return ", ".join([*kept, *(others[i] for i in order)]) or caption
