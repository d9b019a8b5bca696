"""KEY.json: what of a sample's record fits into its fixed number of bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SHORTEST_CAPTION = 8  # characters that a caption is cut by, and to
# What KEY.json gives up first when it does not fit; captions are cut, not dropped.
DROP_ORDER = ("source", "url", "original_size", "sha256", "captions", "source_key")


def fit_record(record: Mapping[str, Any], size: int) -> bytes:
    """Return JSON of `record` padded with spaces to `size` bytes.

    What does not fit goes in `DROP_ORDER`; captions are shortened at code points.
    """
    kept = dict(record)
    for name in DROP_ORDER:
        if len(data := _compact(kept)) <= size:
            break
        if name == "captions":
            kept = _cut_captions(kept, size)
        else:
            kept.pop(name, None)
    data = _compact(kept)
    assert len(data) <= size, "the fixed part of a record fits"
    return data.ljust(size)


def _cut_captions(record: dict[str, Any], size: int) -> dict[str, Any]:
    """Return the longest captions shortened until the record fits; of very many, the first few."""
    kept = [text[:size] for text in record.get("captions", ())][:size]
    cut = record | {"captions": kept, "captions_cut": True}
    while len(_compact(cut)) > size and kept:
        longest = max(map(len, kept))
        if longest > SHORTEST_CAPTION:
            shorter = longest - SHORTEST_CAPTION
            kept[:] = [text[:shorter] if len(text) == longest else text for text in kept]
        else:
            kept.pop()
    return cut


def _compact(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")  # of lone surrogates, as JSON escapes them
