"""From rows to samples: reading, decoding and captions run ahead in threads of their own.

The VAE has the caller's thread, which Ctrl-C interrupts and where most of the work is done.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from prep.cache.reuse import NOTHING, Known
from prep.encode.captions import CaptionMemo
from prep.encode.shuffle import Shuffle
from prep.encode.threads import mapped, read_ahead
from prep.encoders.text import TextEncoder
from prep.encoders.vae import Started, VaeEncoder
from prep.filters.filters import Filters
from prep.images.crop import BadImage, Framing, Picture, prepare
from prep.sources.find import Row, Unit
from shared.machine.device import use_device
from shared.wording import counted

T = TypeVar("T")

WAITING_BATCHES = 8  # so many pictures wait, over all sizes, for others of their size
WAITING_BYTES = 128_000_000  # of rows that wait to be decoded, or one row that has more
CHUNKS_AHEAD = 2  # whose captions a GPU encodes before the VAE gets their pictures


@dataclass(frozen=True)
class Settings:
    """What of the flags decides a sample's bytes."""

    framing: Framing
    keep_logvar: bool
    max_captions: int
    filters: Filters = field(default_factory=Filters)
    clip_skip: int = 0
    shuffle: Shuffle | None = None

    def captions(self, row: Row, image_sha256: str) -> tuple[str, ...]:
        """A row's captions, those that its own are shuffled to."""
        if self.shuffle is None:
            return row.captions
        return self.shuffle.captions(row.captions, image_sha256, self.max_captions)


@dataclass
class Sample:
    """An input row on its way through; `reason` says why it was rejected, if it was."""

    row: Row
    image_sha256: str
    pictures: tuple[Picture, ...] = ()  # one per view, all of one size
    reason: str = ""
    truncated_captions: int = 0
    fp32_retries: int = 0  # views that the VAE had to encode a second time
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def captions(self) -> tuple[str, ...]:
        """The row's captions."""
        return self.row.captions


@dataclass(frozen=True)
class Encoders:
    """The frozen networks."""

    vae: VaeEncoder
    text: TextEncoder


@dataclass
class Work:
    """What went through the encoders, and the pictures whose latents were there to be copied."""

    pictures: int = 0
    captions: int = 0
    copied: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.pictures + other.pictures,
            self.captions + other.captions,
            self.copied + other.copied,
        )

    def __str__(self) -> str:
        if not (self.pictures or self.captions or self.copied):
            return "nothing had to be encoded"
        copied = f", {counted(self.copied, 'picture')} copied" if self.copied else ""
        captions = counted(self.captions, "caption")
        return f"{counted(self.pictures, 'picture')} and {captions} encoded{copied}"


def samples(
    unit: Unit, encoders: Encoders, settings: Settings, workers: int, known: Known, work: Work
) -> Generator[list[Sample], None, None]:
    """Every row of `unit` as a finished or rejected sample, those of one size in source order.

    Pictures and captions that `known` has are copied. Chunks and the sharing of captions never
    leave a unit, so that its bytes depend on nothing else.
    """
    largest = max(encoders.vae.batch_size, encoders.text.batch_size)
    chunk_size = max(1, largest // settings.framing.views)
    memo, waiting = CaptionMemo(encoders.text, known), Waiting(encoders.vae, settings)
    rows = decoded(unit.rows(), settings, workers, chunk_size, known)
    with (
        closing(read_ahead(chunks(rows, chunk_size), 1)) as prepared,
        closing(embedded(prepared, memo, settings)) as chunked,
    ):
        for chunk in chunked:
            done = [sample for sample in chunk if sample.reason or not sample.pictures]
            work.copied += sum(not sample.reason for sample in done)
            for sample in chunk:
                if sample.pictures and not sample.reason:
                    work.pictures += 1
                    done += waiting.add(sample)
            yield done
    yield list(waiting.rest())
    work.captions += memo.encoded


@dataclass(frozen=True)
class Batch:
    """Samples of one size on their way through the VAE."""

    samples: list[Sample]
    started: list[Started]


class Waiting:
    """Prepared samples by picture size, until there are enough of one size for the VAE.

    Which of them share a call does not show in the latents: the batch's shape is always the same.
    A batch is finished when the next one has started, so that a GPU never waits for this thread.
    """

    def __init__(self, vae: VaeEncoder, settings: Settings) -> None:
        self.vae, self.settings = vae, settings
        self.limit = WAITING_BATCHES * vae.batch_size  # pictures
        # As few samples as fill whole batches with all their views.
        self.enough = vae.batch_size // math.gcd(vae.batch_size, settings.framing.views)
        self.sizes: dict[tuple[int, ...], list[Sample]] = {}
        self.running: Batch | None = None

    def add(self, sample: Sample) -> list[Sample]:
        """Take a sample; returns those that are finished thereby."""
        size = sample.pictures[0].pixels.shape
        self.sizes.setdefault(size, []).append(sample)
        if len(self.sizes[size]) == self.enough:
            return self._start(size)
        if sum(map(len, self.sizes.values())) * len(sample.pictures) >= self.limit:
            return self._start(max(self.sizes, key=lambda size: len(self.sizes[size])))
        return []

    def rest(self) -> Iterator[Sample]:
        """Finish whatever is left."""
        for size in list(self.sizes):
            yield from self._start(size)
        yield from self._finish()

    def _start(self, size: tuple[int, ...]) -> list[Sample]:
        batch = start(self.sizes.pop(size), self.vae)
        finished = self._finish()
        self.running = batch
        return finished

    def _finish(self) -> list[Sample]:
        batch, self.running = self.running, None
        return [] if batch is None else finish(batch, self.vae, self.settings)


def decoded(
    rows: Iterable[Row], settings: Settings, workers: int, ahead: int, known: Known = NOTHING
) -> Generator[Sample, None, None]:
    """Prepare pictures in `workers` threads, at most `ahead` of them waiting; keeps the order.

    Fewer wait where they are large: `WAITING_BYTES` in all.
    """
    prepared = partial(decode_row, settings=settings, known=known)
    return mapped(prepared, rows, workers, ahead, "decode", weigh, WAITING_BYTES)


def weigh(row: Row) -> int:
    """Bytes of memory that a row takes until it is decoded, about."""
    return row.weight


def decode_row(row: Row, settings: Settings, known: Known = NOTHING) -> Sample:
    """A sample with its pictures, with what the cache has of them, or with why there are none.

    It does without the file's bytes: hundreds of samples wait for the encoders.
    """
    reason = row.problem or settings.filters.reason(row.metadata)
    digest = hashlib.sha256(row.image or b"").hexdigest()
    captions = settings.captions(row, digest)
    sample = Sample(replace(row.unburdened(), captions=captions), digest, reason=reason)
    if sample.reason or row.image is None:
        return sample
    if found := known.picture(sample.image_sha256):
        sample.arrays, sample.fp32_retries = found
        return sample
    try:
        sample.pictures = prepare(row.image, settings.framing)
    except BadImage as error:
        sample.reason = str(error)
    return sample


def embedded(
    chunked: Iterable[list[Sample]], memo: CaptionMemo, settings: Settings
) -> Generator[list[Sample], None, None]:
    """Add the captions' embeddings to the samples of each chunk.

    On a GPU in a thread, so that the VAE is not kept waiting. On a CPU two threads with a team of
    OpenMP's each would only take the same cores in turns.
    """
    work = partial(embed, memo=memo, settings=settings)
    device = memo.encoder.device
    if device.type == "cuda":
        begin = partial(use_device, device)
        yield from mapped(work, chunked, 1, CHUNKS_AHEAD, "captions", begin=begin)
    else:
        yield from map(work, chunked)


def embed(chunk: list[Sample], memo: CaptionMemo, settings: Settings) -> list[Sample]:
    """Add `prompt_embeds` `[captions, L, D]` and `pooled_prompt_embeds` `[captions, P]`.

    A row with fewer captions than the cache keeps repeats them; `num_captions` tells. Samples that
    are rejected pass through.
    """
    batch = [sample for sample in chunk if not sample.reason]
    texts = [captions_kept(sample, settings) for sample in batch]
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(texts)))
    if not distinct:
        return chunk
    encoded = dict(zip(distinct, memo.encode(distinct), strict=True))
    for sample, kept in zip(batch, texts, strict=True):
        sample.truncated_captions = sum(encoded[text].truncated for text in kept)
        rows = [encoded[kept[i % len(kept)]].arrays for i in range(settings.max_captions)]
        for name in rows[0]:
            sample.arrays[name] = np.stack([row[name] for row in rows])
        if not all(np.isfinite(sample.arrays[name]).all() for name in rows[0]):
            sample.reason = "non-finite prompt_embeds"
    return chunk


def captions_kept(sample: Sample, settings: Settings) -> list[str]:
    """The captions whose embeddings the cache holds."""
    return list(sample.captions[: settings.max_captions])


def start(batch: list[Sample], vae: VaeEncoder) -> Batch:
    """Hand the pixels of samples of one size to the VAE, and add `time_ids` `[views, 6]`."""
    pixels = [picture.pixels for sample in batch for picture in sample.pictures]
    for sample in batch:
        time_ids = [picture.time_ids for picture in sample.pictures]
        sample.arrays["time_ids"] = np.asarray(time_ids, dtype=np.int32)
        sample.pictures = ()  # the pixels have done their work
    return Batch(batch, [vae.start(some) for some in chunks(pixels, vae.batch_size)])


def finish(batch: Batch, vae: VaeEncoder, settings: Settings) -> list[Sample]:
    """Add `latents` `[views, C or 2C, h, w]` to the batch's samples."""
    parts, retried = list[NDArray[np.float32]](), list[bool]()
    for started in batch.started:
        parts.append(vae.finish(started))
        retried += vae.retried
    moments = np.concatenate(parts)
    kept = moments if settings.keep_logvar else moments[:, : vae.channels]
    with np.errstate(over="ignore"):
        latents = kept.astype(np.float16)
    views = settings.framing.views
    for number, sample in enumerate(batch.samples):
        mine = slice(number * views, (number + 1) * views)
        sample.fp32_retries = sum(retried[mine])
        sample.arrays["latents"] = latents[mine].copy()  # a view would hold the whole batch
        if not np.isfinite(sample.arrays["latents"]).all():
            sample.reason = "non-finite latents"
    return batch.samples


def chunks(items: Iterable[T], size: int) -> Generator[list[T], None, None]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
