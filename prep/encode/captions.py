"""Captions of a unit become their embeddings, each text encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prep.cache.reuse import Arrays, Known
from prep.encoders.text import TextEncoder
from shared.cache.conditioning import TextEmbeds

MEMO_CAPTIONS = 2048  # 0.6 GB of SDXL embeddings


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
        """What is to be known of each caption."""
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
