"""A unit's answers that were kept while its samples were drawn, until they are committed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prep.cache.spool import Spool, order_of
from shared.cache.answers import AnswersRecord, AnswersShard
from shared.cache.answers_store import answers_of, commit_answers
from shared.cache.layout import Layout
from shared.cache.paths import CachePaths
from shared.cache.units import Shard


class AnswersSpool:
    """Answers of one latent size, spooled like the samples that they belong to."""

    def __init__(self, cache: CachePaths, unit: str, layout: Layout) -> None:
        self.cache, self.unit = cache, unit
        self.spool = Spool(layout, cache.tmp)
        self.unfit: set[int] = set()  # samples whose answers are not finite, by their turn
        self.retried = 0  # answers

    def add(self, key: str, of: int, answers: NDArray[np.float16], retried: bool) -> None:
        """Append a sample's answers `[K, 3, C, h, w]`; `of` is the checksum of the sample.

        `retried` says that it was drawn a second time, in fp32.
        """
        if not np.isfinite(answers).all():
            self.unfit.add(len(self.spool.keys))
            answers = np.zeros_like(answers)
        again = list(range(len(answers))) if retried else []
        self.retried += len(again)
        record = {"of": of, **({"retried": again} if again else {})}
        self.spool.add(key, record, {"answers": answers})

    def write(self) -> None:
        """Write what was added."""
        self.spool.write()

    def commit(self, samples: Sequence[Shard]) -> None:
        """Publish the answers to the unit's only shard of samples, then their record.

        A unit without samples has none.
        """
        if not samples:
            return
        [shard] = samples
        name, digest = self.spool.write_shard(
            answers_of(self.cache).shards, self.cache.tmp, self.unit
        )
        turns = order_of(self.spool.keys).tolist()
        without = tuple(number for number, turn in enumerate(turns) if turn in self.unfit)
        count, layout = len(turns), self.spool.layout
        answers = AnswersShard(
            f"shards/{name}", shard.file, layout, count, layout.shard_bytes(count), digest, without
        )
        commit_answers(self.cache, AnswersRecord(self.unit, (answers,), self.retried))

    def close(self) -> None:
        """Delete the spool."""
        self.spool.close()
