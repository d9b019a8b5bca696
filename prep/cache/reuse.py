"""What the cache already knows of a source: payloads that are copied instead of encoded again.

A picture is known by the sha256 of its bytes, a caption by its text; the settings are the same
for the whole cache (identity.json). So a sample may move to another unit, get another name or
another caption, and only what is really new goes through the encoders.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shared.cache.layout import Layout
from shared.cache.paths import CachePaths
from shared.cache.units import Shard, UnitRecord
from shared.storage.reading import read_if_there
from shared.storage.urls import Place

DIGEST = 16  # bytes of a hash that stand for it: a collision is out of reach
COLUMNS = ["key", "status", "image_sha256", "captions", "latent_size", "time_ids"]
RETRIES = "fp32_retries"  # which tables of older caches lack

Arrays = dict[str, NDArray[Any]]
Spot = tuple[int, int, int]  # shard, sample in it, and caption (or row) of the sample


@dataclass(frozen=True)
class Latents:
    """The latents of a picture, with what comes with them."""

    values: NDArray[np.float16]  # `[views, C or 2C, h, w]`
    time_ids: NDArray[np.int32]  # `[views, 6]`
    fp32_retries: int  # views that the VAE had to encode a second time
    copied: bool = False  # from a sample that the cache had before
    answers: NDArray[np.float16] | None = None  # `[K, 3, C, h, w]`: kept while they were drawn


class Entries:
    """Digests and the spot of each, 40 bytes an entry: a source may have millions."""

    def __init__(self) -> None:
        self.digests = bytearray()
        self.spots = array("q")

    def add(self, digest: bytes, spot: Spot) -> None:
        """Append an entry."""
        self.digests += digest
        self.spots.extend(spot)


@dataclass(frozen=True)
class Index:
    """Sorted digests and the spot of each."""

    digests: NDArray[np.bytes_]  # [N] S16
    spots: NDArray[np.int64]  # [N, 3]

    @staticmethod
    def of(entries: Entries) -> Index:
        """Build an index over entries; of equal digests the first spot counts."""
        digests = np.frombuffer(entries.digests, dtype=f"S{DIGEST}")
        spots = np.asarray(entries.spots, np.int64).reshape(-1, 3)
        order = np.argsort(digests, kind="stable")
        return Index(digests[order], spots[order])

    def find(self, digest: bytes) -> Spot | None:
        """Where it lies, if it is known."""
        wanted = np.asarray([digest], dtype=self.digests.dtype)[0]  # NumPy drops final zero bytes
        at = int(np.searchsorted(self.digests, wanted))
        if at == len(self.digests) or self.digests[at] != wanted:
            return None
        shard, sample, third = self.spots[at].tolist()
        return shard, sample, third


class Known:
    """Payloads of one source's committed units, found by content.

    The records are those from before anything new is committed, so a picture that moves from one
    unit to another is known in whichever order the units are encoded. Threads may ask.
    """

    def __init__(self, cache: CachePaths, records: Sequence[UnitRecord]) -> None:
        self.cache, self.records = cache, records
        self.shards = [shard for record in records for shard in record.shards]
        self._indexes: tuple[Index, Index] | None = None
        self._time_ids = np.empty((0, 1, 6), np.int32)  # [pictures, views, 6]
        self._retries = array("i")
        self._lock = threading.Lock()

    def picture(self, sha256: str) -> Latents | None:
        """Find the latents of a picture, if the cache has them."""
        found = self._find(0, bytes.fromhex(sha256)[:DIGEST])
        if found is None:
            return None
        row, arrays = found
        return Latents(arrays["latents"], self._time_ids[row], self._retries[row], copied=True)

    def has_picture(self, sha256: str) -> bool:
        """Is there such a picture? Its shard is not looked at."""
        return self._spot(0, bytes.fromhex(sha256)[:DIGEST]) is not None

    def place(self, sha256: str) -> tuple[Shard, int] | None:
        """Where the sample of a picture lies, if there is one: its shard, and its number there."""
        spot = self._spot(0, bytes.fromhex(sha256)[:DIGEST])
        return None if spot is None else (self.shards[spot[0]], spot[1])

    def caption(self, text: str) -> Arrays | None:
        """Find `prompt_embeds` `[L, D]` and `pooled_prompt_embeds` `[P]` of a caption, or None."""
        found = self._find(1, caption_digest(text))
        if found is None:
            return None
        slot, arrays = found
        names = ("prompt_embeds", "pooled_prompt_embeds")
        return {name: arrays[name][slot] for name in names if name in arrays}

    def _spot(self, kind: int, digest: bytes) -> Spot | None:
        if not self.shards:
            return None
        with self._lock:
            self._indexes = self._indexes or self._build()
        return self._indexes[kind].find(digest)

    def _find(self, kind: int, digest: bytes) -> tuple[int, Arrays] | None:
        spot = self._spot(kind, digest)
        if spot is None:
            return None
        shard, sample, third = spot
        path = self.cache.root / self.shards[shard].file
        arrays = read_sample(path, self.shards[shard].layout, sample)
        return None if arrays is None else (third, arrays)

    def _build(self) -> tuple[Index, Index]:
        pictures, captions = Entries(), Entries()
        time_ids = array("i")
        shard = 0
        for record in self.records:
            written = written_rows(self.cache, record)
            for _ in record.shards:
                layout = self.shards[shard].layout
                for sample, row in enumerate(written[layout.latent_size]):
                    digest = bytes.fromhex(row["image_sha256"])[:DIGEST]
                    pictures.add(digest, (shard, sample, len(pictures.spots) // 3))
                    time_ids.extend(row["time_ids"])
                    self._retries.append(row.get(RETRIES, 0))
                    for slot, text in enumerate(row["captions"][: layout.captions]):
                        captions.add(caption_digest(text), (shard, sample, slot))
                shard += 1
        views = self.shards[0].layout.fields[0].shape[0]  # the same in the whole cache
        self._time_ids = np.asarray(time_ids, np.int32).reshape(-1, views, 6)
        return Index.of(pictures), Index.of(captions)


def known_by_source(cache: CachePaths, records: Sequence[UnitRecord]) -> dict[str, Known]:
    """What the units of each source hold."""
    by_source = defaultdict(list)
    for record in records:
        by_source[record.source].append(record)
    return {source: Known(cache, mine) for source, mine in by_source.items()}


NOTHING = Known(CachePaths(Path()), ())


def written_rows(
    cache: CachePaths, record: UnitRecord
) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Read the written rows of a unit's table by latent size, each list in its shard's order.

    None where the table is not the one that was committed: then everything is encoded.
    """
    rows = defaultdict(list)
    content = read_if_there(cache.root / record.samples)
    if content is not None and hashlib.sha256(content).hexdigest() == record.samples_sha256:
        table = pq.read_table(pa.BufferReader(content))
        there = [name for name in (*COLUMNS, RETRIES) if name in table.column_names]
        for row in table.select(there).to_pylist():
            if row["status"] == "written":
                height, width = row["latent_size"]
                rows[height, width].append(row)
    return rows


def read_sample(path: Place, layout: Layout, number: int) -> Arrays | None:
    """Read a sample's arrays; None where the shard is missing or damaged: then it is encoded."""
    try:
        _, record, arrays = layout.read(path, number)
    except (OSError, ValueError):
        return None
    return arrays if layout.crc32(arrays) == record.get("crc32") else None


def caption_digest(text: str) -> bytes:
    """16 bytes that stand for a caption."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST).digest()
