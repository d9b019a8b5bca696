"""From rows to samples: reading and decoding run ahead in threads while the encoders work."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prep.filters import Filters
from prep.images import BadImage, Picture, prepare
from prep.reuse import NOTHING, Known
from prep.sources import Row, Unit
from prep.text import CaptionMemo, TextEncoder
from prep.vae import VaeEncoder


@dataclass(frozen=True)
class Settings:
    """What of the flags decides a sample's bytes."""

    resolution: int
    center_crop: bool
    keep_logvar: bool
    max_captions: int
    filters: Filters = field(default_factory=Filters)


@dataclass
class Sample:
    """An input row on its way through; `reason` says why it was rejected, if it was."""

    row: Row
    image_sha256: str
    picture: Picture | None = None
    reason: str = ""
    truncated_captions: int = 0
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
    """Every row of `unit` as a finished or rejected sample, in source order within a chunk.

    Pictures and captions that `known` has are copied. Chunks and the sharing of captions never
    leave a unit, so that its bytes depend on nothing else.
    """
    chunk_size = max(encoders.vae.batch_size, encoders.text.batch_size)
    memo = CaptionMemo(encoders.text, known)
    for chunk in chunks(decoded(unit.rows(), settings, workers, 2 * chunk_size, known), chunk_size):
        good = [sample for sample in chunk if not sample.reason]
        embed(good, memo, settings)
        fresh = [sample for sample in good if sample.picture is not None]
        for batch in chunks(fresh, encoders.vae.batch_size):
            encode(batch, encoders.vae, settings)
        work.pictures += len(fresh)
        yield from chunk
    work.captions += memo.encoded


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
    """A sample with its picture, with what the cache has of it, or with the reason for neither."""
    reason = row.problem or settings.filters.reason(row.metadata)
    sample = Sample(row, hashlib.sha256(row.image or b"").hexdigest(), reason=reason)
    if sample.reason or row.image is None:
        return sample
    if arrays := known.picture(sample.image_sha256):
        sample.arrays.update(arrays)
        return sample
    try:
        sample.picture = prepare(row.image, settings.resolution, settings.center_crop)
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
    """Add `latents` `[1, C or 2C, h, w]` and `time_ids` `[1, 6]`."""
    pictures = [sample.picture for sample in batch]
    moments = vae.encode([picture.pixels for picture in pictures if picture is not None])
    for sample, picture, moment in zip(batch, pictures, moments, strict=True):
        assert picture is not None
        kept = moment if settings.keep_logvar else moment[: vae.channels]
        with np.errstate(over="ignore"):
            sample.arrays["latents"] = kept[None].astype(np.float16)
        sample.arrays["time_ids"] = np.asarray([picture.time_ids], dtype=np.int32)
        sample.picture = None  # the pixels have done their work
        if not np.isfinite(sample.arrays["latents"]).all():
            sample.reason = "non-finite latents"


def chunks(items: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
