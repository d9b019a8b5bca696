"""Samples drawn at random from a whole cache."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from shared.cache.units import Shard


def draw_indices(shards: Sequence[Shard], count: int, seed: int) -> list[tuple[Shard, int]]:
    """Shard and index of `count` samples drawn at random, in the cache's order; or of all."""
    ends = list(itertools.accumulate(shard.count for shard in shards))
    total = ends[-1] if ends else 0
    rng = np.random.default_rng(seed)
    numbers = sorted(map(int, rng.choice(total, min(count, total), replace=False)))
    at = [bisect_right(ends, number) for number in numbers]
    return [(shards[i], n - ends[i] + shards[i].count) for i, n in zip(at, numbers, strict=True)]
