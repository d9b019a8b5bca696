"""From the rows of a unit to its samples, in stages that run at the same time.

1. Reading (`Unit.rows`, in a thread): the source gives rows, bytes of a picture with captions.
2. Decoding (decode_rows.py, in several threads): a row becomes a `Decoded`, with the pixels of
   each view, or with the latents that the cache has of its picture, or rejected.
3. Captions (prep/encode/captions.py, on a GPU in a thread): a chunk of them becomes `Embedded`.
4. Batching (prep/encode/latents.py): pictures wait for others of their size.
5. The VAE (prep/encode/latents.py): a batch becomes `Encoded`. It has the caller's thread, which
   Ctrl-C interrupts and where most of the work is done.
6. Writing (prep/encode/engine.py and writer.py, in a thread): samples go to the unit's spools.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing

from prep.encode.captions import CaptionMemo, embed_captions
from prep.encode.decode_rows import decode_rows
from prep.encode.latents import encode_pictures
from prep.encode.networks import Encoders
from prep.encode.prefetch import chunks, prefetch
from prep.encode.samples import Encoded
from prep.encode.settings import Settings
from prep.rows.row import Row


def encode_rows(
    rows: Iterable[Row], encoders: Encoders, memo: CaptionMemo, settings: Settings, workers: int
) -> Generator[list[Encoded], None, None]:
    """Yield every row of a unit as a finished sample or a rejected one, in chunks.

    Those of one size keep the order of the rows. Pictures and captions that the cache has
    (`memo.known`) are copied. Chunks and the sharing of captions never leave a unit, so that its
    bytes depend on nothing else.
    """
    views = settings.framing.views
    size = max(1, max(encoders.vae.batch_size, encoders.text.batch_size) // views)
    decoded = chunks(decode_rows(rows, settings, workers, size, memo.known), size)
    with (
        closing(prefetch(decoded, 1)) as prepared,
        closing(embed_captions(prepared, memo, settings.max_captions)) as embedded,
    ):
        encoded = encode_pictures(embedded, encoders.vae, views, settings.keep_logvar)
        yield from chunks(encoded, size)
