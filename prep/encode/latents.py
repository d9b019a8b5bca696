"""Stages 4 and 5 of the pipeline: pictures are batched by size, and the VAE encodes them."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from prep.cache.reuse import Latents
from prep.encode.prefetch import chunks
from prep.encode.samples import Embedded, Encoded
from prep.encoders.vae import Started, VaeEncoder

WAITING_BATCHES = 8  # so many pictures wait, over all sizes, for others of their size


@dataclass(frozen=True)
class Batch:
    """Samples of one size that the VAE is working on, in one or several calls."""

    samples: list[Embedded]
    started: list[Started]


def encode_pictures(
    samples: Iterable[Embedded], vae: VaeEncoder, views: int, keep_logvar: bool
) -> Generator[Encoded, None, None]:
    """Turn every sample's pictures into latents; what needs no VAE passes through.

    Samples of one size stay in order. A batch is finished when the next one has started, so that
    a GPU never waits for this thread.
    """
    running: Batch | None = None
    for batch in batch_by_size(samples, vae.batch_size, views):
        if not batch[0].needs_vae:
            yield from map(pass_through, batch)
            continue
        started = start(batch, vae)
        if running is not None:
            yield from finish(running, vae, keep_logvar)
        running = started
    if running is not None:
        yield from finish(running, vae, keep_logvar)


def batch_by_size(
    samples: Iterable[Embedded], batch_size: int, views: int
) -> Iterator[list[Embedded]]:
    """Yield samples whose pictures have one size, as soon as they fill whole batches of the VAE.

    Where too many pictures of all sizes wait, those of the most frequent size go first. Which
    samples share a call does not show in the latents: the batch's shape is always the same. What
    needs no VAE comes at once.
    """
    enough = batch_size // math.gcd(batch_size, views)  # samples that fill batches with all views
    most = WAITING_BATCHES * batch_size  # pictures
    waiting: dict[tuple[int, ...], list[Embedded]] = {}
    for sample in samples:
        if not sample.needs_vae:
            yield [sample]
            continue
        size = sample.decoded.pictures[0].pixels.shape
        waiting.setdefault(size, []).append(sample)
        if len(waiting[size]) == enough:
            yield waiting.pop(size)
        elif views * sum(map(len, waiting.values())) >= most:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


def start(batch: list[Embedded], vae: VaeEncoder) -> Batch:
    """Hand the pixels of samples of one size to the VAE."""
    pixels = [picture.pixels for sample in batch for picture in sample.decoded.pictures]
    return Batch(batch, [vae.start(some) for some in chunks(pixels, vae.batch_size)])


def finish(batch: Batch, vae: VaeEncoder, keep_logvar: bool) -> list[Encoded]:
    """Wait for the VAE and add `latents` `[views, C or 2C, h, w]` to the batch's samples."""
    done = [vae.finish(started) for started in batch.started]
    moments = np.concatenate([one.moments for one in done])
    retried = np.concatenate([one.retried for one in done])
    kept = moments if keep_logvar else moments[:, : vae.channels]
    with np.errstate(over="ignore"):
        latents = kept.astype(np.float16)
    encoded, at = [], 0
    for sample in batch.samples:
        pictures = sample.decoded.pictures
        mine, at = slice(at, at + len(pictures)), at + len(pictures)
        found = Latents(
            latents[mine].copy(),  # a view would hold the whole batch
            np.asarray([picture.time_ids for picture in pictures], dtype=np.int32),
            int(retried[mine].sum()),
        )
        finite = np.isfinite(found.values).all()
        encoded.append(_encoded(sample, found, "" if finite else "non-finite latents"))
    return encoded


def pass_through(sample: Embedded) -> Encoded:
    """Finish a sample whose latents are copied, or a rejected row."""
    return _encoded(sample, sample.decoded.copied, sample.reason)


def _encoded(sample: Embedded, latents: Latents | None, reason: str) -> Encoded:
    decoded = sample.decoded
    return Encoded(decoded.row, decoded.image_sha256, sample.embeds, latents, reason)
