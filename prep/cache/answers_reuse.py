"""Answers that a cache has: which units are complete with them, and what can be copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shared.cache.answers import AnswersManifest, AnswersRecord, AnswersShard
from shared.cache.answers_store import answered, answers_of, open_answers
from shared.cache.layout import Layout
from shared.cache.paths import CachePaths
from shared.cache.units import Shard, UnitRecord
from shared.errors import UserError
from shared.storage.files import file_sizes


def in_place(record: AnswersRecord, sizes: Mapping[str, int]) -> bool:
    """Are all files of a record there? `sizes` are those of the files in answers/shards/."""
    return all(sizes.get(s.file.removeprefix("shards/")) == s.size for s in record.shards)


def with_answers(
    cache: CachePaths, units: Sequence[UnitRecord], records: Mapping[str, AnswersRecord], count: int
) -> list[UnitRecord]:
    """Return the units whose samples all have `count` answers, with their files in place."""
    sizes = file_sizes(answers_of(cache).shards)

    def complete(unit: UnitRecord) -> bool:
        record = records.get(unit.name)
        found = answered(record, unit, count)
        return not unit.shards or (record is not None and found and in_place(record, sizes))

    return [unit for unit in units if complete(unit)]


def former_answers(cache: CachePaths) -> AnswersManifest | None:
    """Return the manifest of the answers as it is; None where there is none that can be read."""
    try:
        return open_answers(cache.root, check_sizes=False)
    except UserError:
        return None


class KnownAnswers:
    """Answers that are copied with their samples, found by these samples' shards.

    A record that was replaced since may be missing; the former manifest still has its shards.
    """

    def __init__(self, cache: CachePaths, shards: Iterable[AnswersShard], layout: Layout) -> None:
        self.cache, self.layout = cache, layout
        self.by_samples = {shard.samples: shard for shard in shards if shard.layout == layout}

    def has(self, samples: Shard) -> bool:
        """Are there answers to a shard's samples? They are not looked at."""
        return samples.file in self.by_samples

    def find(self, samples: Shard, number: int, key: str) -> NDArray[np.float16] | None:
        """Read the answers `[K, 3, C, h, w]` of a sample of a shard.

        None where there are none, or damaged ones, or where the sample had another key, by which
        the steps were chosen that they are of.
        """
        shard = self.by_samples.get(samples.file)
        if shard is None or number in shard.without:
            return None
        try:
            path = answers_of(self.cache).root / shard.file
            found, record, arrays = self.layout.read(path, number)
        except (OSError, ValueError):
            return None
        sound = found == key and self.layout.crc32(arrays) == record.get("crc32")
        return arrays["answers"] if sound else None
