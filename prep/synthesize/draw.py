"""A unit of captions, drawn and committed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from prep.cache.answers_reuse import KnownAnswers
from prep.cache.answers_spool import AnswersSpool
from prep.cache.reuse import NOTHING, Known, Latents, known_by_source
from prep.encode import engine
from prep.encode.captions import CaptionMemo, embed_chunk
from prep.encode.latents import pass_through
from prep.encode.prefetch import chunks
from prep.encode.samples import Decoded, Embedded, Encoded
from prep.encode.settings import Settings
from prep.encode.writer import UnitWriter, sample_key
from prep.engines.job import Outcome, Tick
from prep.rows.row import Row
from prep.rows.unit import Counted, Unit
from prep.synthesize.keeping import Keeping
from prep.synthesize.teacher import Canvas, Networks, Teacher, load_text
from shared.cache.answers import AnswersShard
from shared.cache.conditioning import TextEmbeds
from shared.cache.identity import Drawn, Shapes
from shared.cache.paths import CachePaths
from shared.cache.units import UnitRecord
from shared.machine.device import pick_device
from shared.models.family import Model
from shared.wording import counted


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know to draw any unit; it can be sent to another machine."""

    cache: CachePaths
    model: Model
    shapes: Shapes
    canvas: Canvas
    drawn: Drawn
    settings: Settings
    max_reject_fraction: float
    records: tuple[UnitRecord, ...]  # of the cache as it was before: what they hold is copied
    keeping: Keeping | None = None  # of answers
    answers: tuple[AnswersShard, ...] = ()  # likewise as before

    @property
    def device(self) -> str:
        """The kind of device that the networks run on."""
        return self.shapes.device

    def load(self) -> Networks:
        """The networks, on a device that is free for them."""
        device = pick_device(self.device)  # Ray shows each worker a GPU of its own
        text = load_text(self.model, self.shapes, self.settings.clip_skip, device)
        empty = text.unconditional()
        return Networks(text, Teacher(self.model.source, self.canvas, self.drawn, empty, device))

    def do(self, unit: Unit, networks: Networks, tick: Tick) -> Outcome:
        """Draw and commit a unit."""
        return draw_unit(self, unit, networks, tick)

    @cached_property
    def known(self) -> dict[str, Known]:
        """What the cache has of each source."""
        return known_by_source(self.cache, self.records)

    @cached_property
    def known_answers(self) -> KnownAnswers | None:
        """What the cache has of answers."""
        return known_answers(self.cache, self.keeping, self.answers)

    def stock(self, unit: Unit) -> Stock:
        """What of a unit's samples is there already."""
        known = self.known.get(unit.source, NOTHING)
        return Stock(unit.source, known, self.known_answers)


def known_answers(
    cache: CachePaths, keeping: Keeping | None, shards: Iterable[AnswersShard]
) -> KnownAnswers | None:
    """Index answers in these shards; None where none are kept."""
    return None if keeping is None else KnownAnswers(cache, shards, keeping.layout)


@dataclass(frozen=True)
class Stock:
    """What the cache has of a source: samples, with their answers where those are kept."""

    source: str
    known: Known
    answers: KnownAnswers | None

    def has(self, digest: str) -> bool:
        """Is the sample of this hash there? No shard is looked at."""
        if self.answers is None:
            return self.known.has_picture(digest)
        place = self.known.place(digest)
        return place is not None and self.answers.has(place[0])

    def find(self, row: Row, digest: str) -> Latents | None:
        """Read a row's latents, with their answers; None where either is missing or damaged."""
        found, place = self.known.picture(digest), self.known.place(digest)
        if found is None or place is None or self.answers is None:
            return found
        answers = self.answers.find(*place, sample_key(self.source, row))
        return None if answers is None else replace(found, answers=answers)


class Work(engine.Work):
    """What was drawn and encoded, and the samples that were there to be copied."""

    def __str__(self) -> str:
        if not (self.pictures or self.captions or self.copied):
            return "nothing had to be drawn"
        copied = f", {counted(self.copied, 'sample')} copied" if self.copied else ""
        captions = counted(self.captions, "caption")
        return f"{counted(self.pictures, 'sample')} drawn, {captions} encoded{copied}"


def draw_unit(job: Job, unit: Unit, networks: Networks, tick: Tick) -> Outcome:
    """Draw and commit a unit; `tick` is told of each row, and how many are rejected so far.

    It shares nothing with other units, and doing it twice gives the same files. Raises UserError
    where the disk is full or too many rows are rejected.
    """
    stock, source = job.stock(unit), Counted(unit.reader)
    memo, keeping = CaptionMemo(networks.text, stock.known), job.keeping
    answers = None if keeping is None else AnswersSpool(job.cache, unit.name, keeping.layout)
    channels = job.canvas.vae.channels
    writer = UnitWriter(job.cache, unit, job.settings, channels, answers=answers)
    rows = replace(unit, reader=source).rows()
    try:
        for samples in draw_rows(rows, networks.teacher, memo, stock, keeping):
            tick(writer.add(samples), writer.rejected.total())
        writer.commit(job.max_reject_fraction, source.handed)
    finally:
        writer.close()
    return Outcome(writer.read, Work(writer.encoded, memo.encoded, writer.copied))


def draw_rows(
    rows: Iterable[Row], teacher: Teacher, memo: CaptionMemo, stock: Stock, keeping: Keeping | None
) -> Iterator[list[Encoded]]:
    """Yield every row of a unit as a finished sample or a rejected one, in chunks.

    What the cache has is copied. Batches and the sharing of captions never leave a unit, so that
    its bytes depend on nothing else.
    """
    size, waiting = teacher.drawn.batch_size, list[Embedded]()
    found = (look_up(*one, stock) for one in numbered(rows, teacher.drawn.seed))

    def draw(samples: Sequence[Embedded]) -> list[Encoded]:
        keys = [sample_key(stock.source, sample.decoded.row) for sample in samples]
        return draw_batch(samples, teacher, None if keeping is None else keeping.intervals(keys))

    for chunk in chunks(found, size):
        finished = []
        for sample in embed_chunk(chunk, memo, 1):
            if sample.reason or sample.decoded.copied:
                finished.append(pass_through(sample))
            else:
                waiting.append(sample)
        if len(waiting) >= size:
            finished += draw(waiting[:size])
            del waiting[:size]
        yield finished
    if waiting:
        yield draw(waiting)


def numbered(rows: Iterable[Row], seed: int) -> Iterator[tuple[Row, str]]:
    """Each row with the hash by which its sample is known."""
    met = Counter[str]()
    for row in rows:
        caption = row.captions[0] if row.captions else ""
        yield row, sample_hash(seed, caption, met[caption])
        met[caption] += 1


def sample_hash(seed: int, caption: str, number: int) -> str:
    """64 hex digits that stand for a sample: the n-th of its caption in its source, with a seed.

    All else that decides its latents is the same in the whole cache.
    """
    text = f"{seed}\0{number}\0{caption}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def noise_seed(digest: str) -> int:
    """Turn a sample's hash into the seed of its generator: its first 16 digits, halved."""
    return int(digest[:16], 16) >> 1  # 63 bits, which torch takes


def look_up(row: Row, digest: str, stock: Stock) -> Decoded:
    """Take a sample's latents from the cache, where it has them."""
    if row.problem:
        return Decoded(row, digest, reason=row.problem)
    return Decoded(row, digest, copied=stock.find(row, digest))


def draw_batch(
    samples: Sequence[Embedded], teacher: Teacher, intervals: NDArray[np.int64] | None
) -> list[Encoded]:
    """Let the teacher draw the latents of some samples; keep answers at their `intervals` `[n, K]`.

    What the answers' bytes depend on is the same in the whole cache, too.
    """
    seeds = [noise_seed(sample.decoded.image_sha256) for sample in samples]
    drawing = teacher.draw(texts_of(samples), seeds, intervals)
    side = teacher.canvas.resolution
    time_ids = np.asarray([[side, side, 0, 0, side, side]], dtype=np.int32)
    finished = []
    for n, (sample, values) in enumerate(zip(samples, drawing.latents, strict=True)):
        answers = None if drawing.answers is None else drawing.answers[n].copy()
        found = Latents(values[None].copy(), time_ids, int(drawing.retried[n]), answers=answers)
        reason = "" if np.isfinite(values).all() else "non-finite latents"
        decoded = sample.decoded
        finished.append(Encoded(decoded.row, decoded.image_sha256, sample.embeds, found, reason))
    return finished


def texts_of(samples: Sequence[Embedded]) -> TextEmbeds:
    """Embeddings of the samples' captions, as they are stored."""
    arrays = [sample.embeds.arrays for sample in samples if sample.embeds is not None]
    joined = {
        name: torch.from_numpy(np.concatenate([one[name] for one in arrays])) for name in arrays[0]
    }
    return TextEmbeds(**joined)
