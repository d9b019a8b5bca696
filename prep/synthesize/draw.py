"""A unit of captions, drawn and committed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from prep.cache.reuse import NOTHING, Known, Latents, known_by_source
from prep.encode import engine
from prep.encode.captions import CaptionMemo, embed_chunk
from prep.encode.latents import pass_through
from prep.encode.prefetch import chunks
from prep.encode.samples import Decoded, Embedded, Encoded
from prep.encode.settings import Settings
from prep.encode.writer import UnitWriter
from prep.engines.job import Outcome, Tick
from prep.rows.row import Row
from prep.rows.unit import Counted, Unit
from prep.synthesize.teacher import Canvas, Networks, Teacher, load_text
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
    known, source = job.known.get(unit.source, NOTHING), Counted(unit.reader)
    memo = CaptionMemo(networks.text, known)
    writer = UnitWriter(job.cache, unit, job.settings, job.canvas.vae.channels)
    rows = replace(unit, reader=source).rows()
    try:
        for samples in draw_rows(rows, networks.teacher, memo):
            tick(writer.add(samples), writer.rejected.total())
        writer.commit(job.max_reject_fraction, source.handed)
    finally:
        writer.close()
    return Outcome(writer.read, Work(writer.encoded, memo.encoded, writer.copied))


def draw_rows(rows: Iterable[Row], teacher: Teacher, memo: CaptionMemo) -> Iterator[list[Encoded]]:
    """Yield every row of a unit as a finished sample or a rejected one, in chunks.

    What the cache has (`memo.known`) is copied. Batches and the sharing of captions never leave a
    unit, so that its bytes depend on nothing else.
    """
    size, waiting = teacher.drawn.batch_size, list[Embedded]()
    found = (look_up(*one, memo.known) for one in numbered(rows, teacher.drawn.seed))
    for chunk in chunks(found, size):
        finished = []
        for sample in embed_chunk(chunk, memo, 1):
            if sample.reason or sample.decoded.copied:
                finished.append(pass_through(sample))
            else:
                waiting.append(sample)
        if len(waiting) >= size:
            finished += draw_batch(waiting[:size], teacher)
            del waiting[:size]
        yield finished
    if waiting:
        yield draw_batch(waiting, teacher)


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


def look_up(row: Row, digest: str, known: Known) -> Decoded:
    """Take a sample's latents from the cache, where it has them."""
    if row.problem:
        return Decoded(row, digest, reason=row.problem)
    return Decoded(row, digest, copied=known.picture(digest))


def draw_batch(samples: Sequence[Embedded], teacher: Teacher) -> list[Encoded]:
    """Let the teacher draw the latents of some samples."""
    drawing = teacher.draw(
        texts_of(samples), [noise_seed(sample.decoded.image_sha256) for sample in samples]
    )
    side = teacher.canvas.resolution
    time_ids = np.asarray([[side, side, 0, 0, side, side]], dtype=np.int32)
    finished = []
    for sample, values, retried in zip(samples, drawing.latents, drawing.retried, strict=True):
        found = Latents(values[None].copy(), time_ids, int(retried))
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
