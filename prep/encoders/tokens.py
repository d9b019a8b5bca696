"""Captions to token ids, and what tells one tokenizer from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

ENOUGH = 4096  # characters that hold more tokens than an encoder reads, or are no caption
# Padding, capitals, accents, digits, marks, a clitic, blanks, a line break, more than fits.
PROBES = ("", "a photo of a cat", "It's 1234 STARS & more!", "Zürich,  ½\n(café)", "words " * 200)


def tokenized(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int
) -> tuple[list[list[int]], list[bool]]:
    """Give `length` token ids a caption, `[N, L]`, and say which captions have more than that.

    Of a long caption the first words are tokenized; the whole only where they are too few.
    """
    ids, longer = _tokenized(tokenizer, [first_words(text) for text in captions], length)
    for i, text in enumerate(captions):
        if not longer[i] and len(text) > ENOUGH:
            (ids[i],), (longer[i],) = _tokenized(tokenizer, [text], length)
    return ids, longer


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], length: int
) -> tuple[list[list[int]], list[bool]]:
    tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True)
    return tokens.input_ids, [bool(encoding.overflowing) for encoding in tokens.encodings]


def first_words(text: str) -> str:
    """`text` up to a space before `ENOUGH` characters: no token of CLIP's reaches over a space."""
    return text if len(text) <= ENOUGH else text[: text.rfind(" ", 0, ENOUGH) + 1]


def tokens_fingerprint(tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    """16 hex digits over the vocabulary and the ids of `PROBES`, so files' formats do not count."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(json.dumps([token, number]).encode())
    digest.update(json.dumps(_tokenized(tokenizer, list(PROBES), length)).encode())
    return digest.hexdigest()[:16]
