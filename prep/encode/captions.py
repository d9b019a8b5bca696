"""Stage 3 of the pipeline: captions become embeddings, each text of a unit encoded once."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from prep.cache.reuse import Arrays, Known
from prep.encode.prefetch import map_ahead
from prep.encode.samples import Decoded, Embedded, Embeds
from prep.encoders.text import TextEncoder
from shared.cache.conditioning import TextEmbeds
from shared.machine.device import use_device

MEMO_CAPTIONS = 2048  # 0.6 GB of SDXL embeddings
CHUNKS_AHEAD = 2  # whose captions a GPU encodes before the VAE gets their pictures


@dataclass(frozen=True)
class Caption:
    """A caption's arrays, `prompt_embeds` `[L, D]` and `pooled_prompt_embeds` `[P]`."""

    arrays: Arrays
    truncated: bool  # has it more tokens than the encoder reads?


class CaptionMemo:
    """Encodes equal captions once, as far as `MEMO_CAPTIONS` remember; `encoded` counts them.

    What the cache already has is looked up in `known`, not encoded.
    """

    def __init__(self, encoder: TextEncoder, known: Known) -> None:
        self.encoder, self.known = encoder, known
        self.memory: dict[str, Caption] = {}
        self.encoded = 0

    def encode(self, captions: Sequence[str]) -> list[Caption]:
        """Encode the captions, or find those that were encoded before."""
        unmet = [text for text in dict.fromkeys(captions) if text not in self.memory]
        found = {text: arrays for text in unmet if (arrays := self.known.caption(text))}
        counted = zip(found.items(), self.encoder.truncated(list(found)), strict=True)
        for (text, arrays), truncated in counted:
            self.memory[text] = Caption(arrays, truncated)
        if fresh := [text for text in unmet if text not in found]:
            self.encoded += len(fresh)
            embeds, longer = self.encoder.encode_and_count(fresh)
            for i, (text, truncated) in enumerate(zip(fresh, longer, strict=True)):
                self.memory[text] = Caption(_arrays(embeds[i]), truncated)
        found_all = [self.memory[text] for text in captions]
        while len(self.memory) > MEMO_CAPTIONS:
            del self.memory[next(iter(self.memory))]  # the oldest
        return found_all


def _arrays(embeds: TextEmbeds) -> Arrays:
    arrays = {"prompt_embeds": embeds.prompt_embeds[0].numpy()}
    if embeds.pooled_prompt_embeds is not None:
        arrays["pooled_prompt_embeds"] = embeds.pooled_prompt_embeds[0].numpy()
    return arrays


def embed_captions(
    chunks: Iterable[list[Decoded]], memo: CaptionMemo, slots: int
) -> Generator[Embedded, None, None]:
    """Add the embeddings of `slots` captions to each sample, chunk by chunk.

    On a GPU in a thread, so that the VAE is not kept waiting. On a CPU two threads with a team of
    OpenMP's each would only take the same cores in turns.
    """
    embed = partial(embed_chunk, memo=memo, slots=slots)
    device = memo.encoder.device
    if device.type == "cuda":
        start = partial(use_device, device)
        embedded = map_ahead(embed, chunks, 1, CHUNKS_AHEAD, "captions", start=start)
        yield from itertools.chain.from_iterable(embedded)
    else:
        yield from itertools.chain.from_iterable(map(embed, chunks))


def embed_chunk(chunk: list[Decoded], memo: CaptionMemo, slots: int) -> list[Embedded]:
    """Add the embeddings of `slots` captions to each sample; rejected rows pass through.

    A row with fewer captions repeats them; the sample's `num_captions` tells.
    """
    texts = [() if decoded.reason else decoded.row.captions[:slots] for decoded in chunk]
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(texts)))
    encoded = dict(zip(distinct, memo.encode(distinct), strict=True)) if distinct else {}
    return [
        _embedded(decoded, [encoded[text] for text in kept], slots)
        for decoded, kept in zip(chunk, texts, strict=True)
    ]


def _embedded(decoded: Decoded, captions: Sequence[Caption], slots: int) -> Embedded:
    if decoded.reason:
        return Embedded(decoded, reason=decoded.reason)
    repeated = [captions[i % len(captions)].arrays for i in range(slots)]
    arrays = {name: np.stack([one[name] for one in repeated]) for name in repeated[0]}
    finite = all(np.isfinite(array).all() for array in arrays.values())
    embeds = Embeds(arrays, sum(caption.truncated for caption in captions))
    return Embedded(decoded, embeds, "" if finite else "non-finite prompt_embeds")
