"""Stage 2 of the pipeline: a row's picture becomes the pixels of its views."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from dataclasses import replace
from functools import partial
from operator import attrgetter

from prep.cache.reuse import NOTHING, Known
from prep.encode.prefetch import map_ahead
from prep.encode.samples import Decoded
from prep.encode.settings import Settings
from prep.images.crop import BadImage, prepare
from prep.rows.row import Row

WAITING_BYTES = 128_000_000  # of rows that wait to be decoded, or one row that has more


def decode_rows(
    rows: Iterable[Row], settings: Settings, workers: int, ahead: int, known: Known = NOTHING
) -> Generator[Decoded, None, None]:
    """Decode pictures in `workers` threads, at most `ahead` of them waiting; keeps the order.

    Fewer wait where they are large: `WAITING_BYTES` in all.
    """
    weight = attrgetter("weight")
    decode = partial(decode_row, settings=settings, known=known)
    return map_ahead(decode, rows, workers, ahead, "decode", weight, WAITING_BYTES)


def decode_row(row: Row, settings: Settings, known: Known = NOTHING) -> Decoded:
    """Prepare a row's pictures, or take their latents from `known`, or say why it is rejected.

    The result does without the file's bytes: hundreds of rows wait for the encoders.
    """
    reason = row.problem or settings.filters.reason(row.metadata)
    digest = hashlib.sha256(row.image or b"").hexdigest()
    kept = replace(row.unburdened(), captions=settings.captions(row, digest))
    if reason or row.image is None:
        return Decoded(kept, digest, reason=reason)
    if found := known.picture(digest):
        return Decoded(kept, digest, copied=found)
    try:
        return Decoded(kept, digest, prepare(row.image, settings.framing))
    except BadImage as error:
        return Decoded(kept, digest, reason=str(error))
