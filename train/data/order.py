"""Which sample comes when: a pure function of (seed, position), with no state and no index.

Position counts samples consumed by training steps. A bucket (samples of one latent size) is an
endless stream of passes over its ids, each pass a fresh permutation, so every id comes once a pass
for every world size, batch size and number of threads, and a run resumes from one integer.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

SHUFFLED = 65_536  # up to here a real shuffle; few Feistel rounds are biased on small domains
ROUNDS = 8


@dataclass(frozen=True)
class Order:
    """The global batches of a run: `sizes[b]` samples in bucket b, `batch_size` over all ranks."""

    sizes: tuple[int, ...]
    batch_size: int
    seed: int

    def batch(self, index: int) -> tuple[int, Ids]:
        """Bucket and ids within the bucket `[batch_size]` of global batch `index` (0, 1, ...)."""
        bucket, number = self._locate(index)
        start = number * self.batch_size
        return bucket, self.stream(bucket, start, start + self.batch_size)

    def rank_batch(self, index: int, rank: int, world: int) -> tuple[int, Ids, Ids]:
        """A rank's slice of global batch `index`: bucket, ids, and the samples' positions."""
        bucket, ids = self.batch(index)
        share = self.batch_size // world
        here = slice(rank * share, (rank + 1) * share)
        positions = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        return bucket, ids[here], positions[here]

    def rank_passes(self, index: int, rank: int, world: int) -> Ids:
        """How many times each sample of that slice has come before: the passes over its bucket."""
        bucket, number = self._locate(index)
        share = self.batch_size // world
        start = number * self.batch_size + rank * share
        return np.arange(start, start + share) // self.sizes[bucket]

    def stream(self, bucket: int, start: int, stop: int) -> Ids:
        """Positions start..stop of a bucket's endless stream of ids."""
        size = self.sizes[bucket]
        parts = []
        while start < stop:
            epoch, offset = divmod(start, size)
            count = min(size - offset, stop - start)
            wanted = np.arange(offset, offset + count)
            parts.append(permute(wanted, size, (self.seed, bucket, epoch)))
            start += count
        return np.concatenate(parts)

    def batches_before(self, epoch: int) -> int:
        """Global batches in epochs 0 .. epoch - 1: the sum of floor(epoch n_b / B)."""
        return sum(epoch * size // self.batch_size for size in self.sizes)

    def _locate(self, index: int) -> tuple[int, int]:
        """Bucket and number within the bucket of global batch `index`.

        In epoch e, bucket b gives floor((e+1) n_b / B) - floor(e n_b / B) batches, and the batches
        of an epoch are permuted.
        """
        if len(self.sizes) == 1:
            return 0, index
        epoch = self._epoch_of(index)
        first = np.array([epoch * size // self.batch_size for size in self.sizes])
        ends = np.cumsum([(epoch + 1) * size // self.batch_size for size in self.sizes] - first)
        within = np.array([index - self.batches_before(epoch)])
        slot = int(permute(within, int(ends[-1]), (self.seed, -1, epoch))[0])
        bucket = int(np.searchsorted(ends, slot, side="right"))
        return bucket, int(first[bucket] + slot - (ends[bucket - 1] if bucket else 0))

    def _epoch_of(self, index: int) -> int:
        # Each bucket rounds less than a batch away, so no later epoch begins by `index`.
        most = (index + len(self.sizes)) * self.batch_size // sum(self.sizes)
        return bisect_right(range(most + 1), index, key=self.batches_before) - 1


def permute(positions: Ids, size: int, key: tuple[int, ...]) -> Ids:
    """Where a keyed permutation of 0 .. size - 1 sends `positions`."""
    if size <= SHUFFLED:
        return _shuffle(size, key)[positions]
    return _feistel_walk(positions, size, key)


@lru_cache(maxsize=64)
def _shuffle(size: int, key: tuple[int, ...]) -> Ids:
    return _generator(key).permutation(size).astype(np.int64)


def _feistel_walk(positions: Ids, size: int, key: tuple[int, ...]) -> Ids:
    """A Feistel network on the next even power of two, walked until it lands below `size`.

    Black and Rogaway, Ciphers with arbitrary finite domains, 2002, section 4 (cycle walking).
    """
    half = (max(size - 1, 1).bit_length() + 1) // 2
    keys = _generator(key).integers(0, 2**63, ROUNDS, dtype=np.uint64)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask, shift = np.uint64(2**half - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _generator(key: tuple[int, ...]) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([k + 1 for k in key])))
