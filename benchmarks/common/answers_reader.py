"""Reading samples with one of the teacher's answers each, beside `benchmarks.common.readers`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.readers import BATCH, LAYOUT, Read, Samples, places
from shared.cache.answers import AnswersShard, answers_layout
from shared.cache.layout import TRAILER
from train.data.answers import BucketAnswers
from train.data.batch import Slot
from train.data.prefetch import Ring

HELD = 2  # answers of each sample


def ours_with_answers(samples: Samples, threads: int) -> Read:
    """The loader's reader and ring: keys, samples, and one answer of each from its own shard."""
    layout = answers_layout(HELD, 4, LAYOUT.latent_size)
    folder = samples.folder / "answers/shards"
    folder.mkdir(parents=True, exist_ok=True)
    rng, shards = np.random.default_rng(3), []
    for shard in samples.shards:
        path = folder / Path(shard.file).name
        if not path.exists():
            values = rng.standard_normal(layout.fields[0].shape, dtype=np.float32)
            one = layout.pack("0" * 16, {}, {"answers": values})
            path.write_bytes(one * shard.count + TRAILER)
        size = path.stat().st_size
        file = f"shards/{path.name}"
        shards.append(AnswersShard(file, shard.file, layout, shard.count, size, ""))
    answers = BucketAnswers(samples.folder, shards)
    memory = places(torch.float16)

    def read(ids: Sequence[int]) -> None:
        def fill(index: int, place: list[Slot]) -> None:
            rows, views, spans = (("latents", 0), ("prompt_embeds", 0)), place[0].views, []
            numbers, beside = ids[index * BATCH :][:BATCH], []
            samples.bucket.keys(numbers)
            for at, number in enumerate(numbers):
                into = [views["latents"][at], views["prompt_embeds"][at]]
                spans += samples.bucket.spans(number, rows, into)
                shard, start = samples.bucket.locate(number)
                sample = start // LAYOUT.stride
                beside.append(answers.span(shard, sample, number % HELD, views["answers"][at]))
            rest, later = samples.bucket.start(spans), answers.start(beside)
            samples.bucket.finish(rest)
            answers.finish(later)

        with closing(Ring(fill, memory, threads).run(0)) as stream:
            for _ in range(0, len(ids), BATCH):
                next(stream)

    return read
