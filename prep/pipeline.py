"""From rows to samples: reading and decoding run ahead in threads while the encoders work."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from prep.filters import Filters
from prep.images import BadImage, Framing, Picture, prepare
from prep.reuse import NOTHING, Known
from prep.sources import Row, Unit
from prep.text import CaptionMemo, TextEncoder
from prep.vae import VaeEncoder

T = TypeVar("T")

WAITING_BATCHES = 8  # so many pictures wait, over all sizes, for others of their size


@dataclass(frozen=True)
class Settings:
    """What of the flags decides a sample's bytes."""

    framing: Framing
    keep_logvar: bool
    max_captions: int
    filters: Filters = field(default_factory=Filters)
    clip_skip: int = 0


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
    """What went through the encoders; the rest was copied."""

    pictures: int = 0
    captions: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.pictures + other.pictures, self.captions + other.captions)


def samples(
    unit: Unit, encoders: Encoders, settings: Settings, workers: int, known: Known, work: Work
) -> Iterator[Sample]:
    """Every row of `unit` as a finished or rejected sample, those of one size in source order.

    Pictures and captions that `known` has are copied. Chunks and the sharing of captions never
    leave a unit, so that its bytes depend on nothing else.
    """
    largest = max(encoders.vae.batch_size, encoders.text.batch_size)
    chunk_size = max(1, largest // settings.framing.views)
    memo, waiting = CaptionMemo(encoders.text, known), Waiting(encoders.vae, settings)
    for chunk in chunks(decoded(unit.rows(), settings, workers, 2 * chunk_size, known), chunk_size):
        embed([sample for sample in chunk if not sample.reason], memo, settings)
        for sample in chunk:
            if sample.reason or not sample.pictures:
                yield sample
            else:
                work.pictures += 1
                yield from waiting.add(sample)
    yield from waiting.rest()
    work.captions += memo.encoded


class Waiting:
    """Prepared samples by picture size, until there are enough of one size for the VAE.

    Which of them share a call does not show in the latents: the batch's shape is always the same.
    """

    def __init__(self, vae: VaeEncoder, settings: Settings) -> None:
        self.vae, self.settings = vae, settings
        self.limit = WAITING_BATCHES * vae.batch_size  # pictures
        # As few samples as fill whole batches with all their views.
        self.enough = vae.batch_size // math.gcd(vae.batch_size, settings.framing.views)
        self.sizes: dict[tuple[int, ...], list[Sample]] = {}

    def add(self, sample: Sample) -> list[Sample]:
        """Take a sample; returns those that are finished thereby."""
        size = sample.pictures[0].pixels.shape
        self.sizes.setdefault(size, []).append(sample)
        if len(self.sizes[size]) == self.enough:
            return self._encode(size)
        if sum(map(len, self.sizes.values())) * len(sample.pictures) >= self.limit:
            return self._encode(max(self.sizes, key=lambda size: len(self.sizes[size])))
        return []

    def rest(self) -> Iterator[Sample]:
        """Finish whatever is left."""
        for size in list(self.sizes):
            yield from self._encode(size)

    def _encode(self, size: tuple[int, ...]) -> list[Sample]:
        batch = self.sizes.pop(size)
        encode(batch, self.vae, self.settings)
        return batch


def decoded(
    rows: Iterable[Row], settings: Settings, workers: int, ahead: int, known: Known = NOTHING
) -> Iterator[Sample]:
    """Prepare pictures in `workers` threads, at most `ahead` of them waiting; keeps the order."""
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        waiting: deque[Future[Sample]] = deque()
        try:
            for row in rows:
                waiting.append(pool.submit(decode_row, row, settings, known))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def decode_row(row: Row, settings: Settings, known: Known = NOTHING) -> Sample:
    """A sample with its pictures, with what the cache has of them, or with why there are none."""
    reason = row.problem or settings.filters.reason(row.metadata)
    sample = Sample(row, hashlib.sha256(row.image or b"").hexdigest(), reason=reason)
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


def embed(batch: list[Sample], memo: CaptionMemo, settings: Settings) -> None:
    """Add `prompt_embeds` `[captions, L, D]` and `pooled_prompt_embeds` `[captions, P]`.

    A row with fewer captions than the cache keeps repeats them; `num_captions` tells.
    """
    texts = [captions_kept(sample, settings) for sample in batch]
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(texts)))
    arrays = dict(zip(distinct, memo.encode(distinct), strict=True)) if distinct else {}
    for sample, kept in zip(batch, texts, strict=True):
        sample.truncated_captions = memo.encoder.truncated(kept)
        rows = [arrays[kept[i % len(kept)]] for i in range(settings.max_captions)]
        for name in rows[0]:
            sample.arrays[name] = np.stack([row[name] for row in rows])
        if not all(np.isfinite(sample.arrays[name]).all() for name in rows[0]):
            sample.reason = "non-finite prompt_embeds"


def captions_kept(sample: Sample, settings: Settings) -> list[str]:
    """The captions whose embeddings the cache holds."""
    return list(sample.captions[: settings.max_captions])


def encode(batch: list[Sample], vae: VaeEncoder, settings: Settings) -> None:
    """Add `latents` `[views, C or 2C, h, w]` and `time_ids` `[views, 6]` to samples of one size."""
    pixels = [picture.pixels for sample in batch for picture in sample.pictures]
    parts, retried = list[NDArray[np.float32]](), list[bool]()
    for some in chunks(pixels, vae.batch_size):
        parts.append(vae.encode(some))
        retried += vae.retried
    moments = np.concatenate(parts)
    kept = moments if settings.keep_logvar else moments[:, : vae.channels]
    views = settings.framing.views
    for number, sample in enumerate(batch):
        mine = slice(number * views, (number + 1) * views)
        sample.fp32_retries = sum(retried[mine])
        with np.errstate(over="ignore"):
            latents = kept[mine].astype(np.float16)
        sample.arrays["latents"] = latents
        time_ids = [picture.time_ids for picture in sample.pictures]
        sample.arrays["time_ids"] = np.asarray(time_ids, dtype=np.int32)
        sample.pictures = ()  # the pixels have done their work
        if not np.isfinite(latents).all():
            sample.reason = "non-finite latents"


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
