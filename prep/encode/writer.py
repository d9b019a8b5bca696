"""One unit's samples become a shard, an accounting table and, last, a commit record."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prep.cache.answers_spool import AnswersSpool
from prep.cache.spool import Spool, Sums
from prep.encode.samples import Encoded
from prep.encode.settings import Settings
from prep.filters.filters import is_filter
from prep.rows.row import Row
from prep.rows.unit import Unit
from shared.cache.layout import cache_layout
from shared.cache.manifest import commit_unit
from shared.cache.paths import CachePaths
from shared.cache.sums import ChannelSums
from shared.cache.units import UnitRecord
from shared.errors import UserError
from shared.sanitize import storable
from shared.storage.files import move, staged
from shared.wording import counted

ROW_GROUP = 4096  # rows of the accounts that are sorted and compressed at once
LONGEST_KEY = 256  # characters; a longer one stands in samples/ alone

ACCOUNT = pa.schema({
    "key": pa.string(),
    "source_key": pa.string(),
    "status": pa.string(),
    "reason": pa.string(),
    "captions": pa.list_(pa.string()),
    "image_sha256": pa.string(),
    "latent_size": pa.list_(pa.int32()),  # height, width
    "time_ids": pa.list_(pa.int32()),
    "fp32_retries": pa.int32(),  # views that were encoded a second time
})  # fmt: skip


def sample_key(source: str, row: Row) -> str:
    """16 hex digits, unique in the cache: a hash of source, key and occurrence."""
    text = f"{source}\0{row.key}\0{row.occurrence}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class UnitWriter:
    """Spools samples as they come, then publishes them sorted by key.

    What it remembers of a row until then is some hundred bytes, in Arrow's and NumPy's memory.
    `answers` take those that samples come with, and are committed with them.
    """

    def __init__(
        self, cache: CachePaths, unit: Unit, settings: Settings, channels: int, generation: int = 0,
        answers: AnswersSpool | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.unit, self.settings, self.channels = cache, unit, settings, channels
        self.generation, self.answers = generation, answers
        self.spools: dict[tuple[int, int], Spool] = {}
        self.accounts: list[pa.RecordBatch] = []
        self.read = 0
        self.rejected: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # the first row rejected for each reason
        self.encoded = self.copied = 0  # pictures
        self.truncated_captions = self.fp32_retries = 0
        self.sums = Sums()

    def add(self, samples: Sequence[Encoded]) -> int:
        """Take finished samples and rejected rows; returns how many."""
        rows = [self._add(sample) for sample in samples]
        for spool in self.spools.values():
            spool.write()
        if self.answers is not None:
            self.answers.write()
        self.accounts.append(pa.RecordBatch.from_pylist(rows, ACCOUNT))
        self.read += len(rows)
        return len(rows)

    def _add(self, sample: Encoded) -> dict[str, Any]:
        """Spool a sample unless it is rejected; returns its row of the accounts."""
        key = sample_key(self.unit.source, sample.row)
        source_key = storable(sample.row.key)
        if latents := sample.latents:
            self.encoded += not latents.copied
            self.fp32_retries += latents.fp32_retries
        if sample.reason:
            self.rejected[sample.reason] += 1
            self.examples.setdefault(sample.reason, source_key)
        else:
            self._spool(key, sample)
        return {
            "key": key,
            "source_key": source_key,
            "status": "rejected" if sample.reason else "written",
            "reason": sample.reason,
            "captions": [storable(text) for text in sample.row.captions],
            "image_sha256": sample.image_sha256,
            "latent_size": list(latents.values.shape[-2:]) if latents else [],
            "time_ids": latents.time_ids.ravel().tolist() if latents else [],
            "fp32_retries": latents.fp32_retries if latents else 0,
        }

    def _spool(self, key: str, sample: Encoded) -> None:
        """Put a finished sample into the spool of its size."""
        assert sample.latents is not None
        assert sample.embeds is not None
        self.copied += sample.latents.copied
        self.truncated_captions += sample.embeds.truncated
        latents, arrays = sample.latents.values, sample.arrays
        self.sums.add(key, ChannelSums.of(latents[:, : self.channels]))
        size = latents.shape[-2], latents.shape[-1]
        if size not in self.spools:
            pooled = arrays.get("pooled_prompt_embeds")
            layout = cache_layout(
                latents.shape,
                arrays["prompt_embeds"].shape,
                None if pooled is None else pooled.shape,
                micro_conditioning=pooled is not None,
            )
            self.spools[size] = Spool(layout, self.cache.tmp)
        crc32 = self.spools[size].add(key, self._record(sample, arrays["time_ids"]), arrays)
        if self.answers is not None:
            assert sample.latents.answers is not None
            self.answers.add(key, crc32, sample.latents.answers, bool(sample.latents.fp32_retries))

    def _record(self, sample: Encoded, time_ids: NDArray[np.int32]) -> dict[str, Any]:
        """Build the sample's json in the shard."""
        captions = sample.row.captions[: self.settings.max_captions]
        key = storable(sample.row.key)
        return {
            "source": storable(self.unit.source),
            **({"source_key": key} if len(key) <= LONGEST_KEY else {}),
            "captions": [storable(text) for text in captions],
            "num_captions": len(captions),
            "sha256": sample.image_sha256,
            "original_size": time_ids[0, :2].tolist(),
            "url": storable(str(sample.row.metadata.get("url", ""))),
        }

    def commit(self, max_reject_fraction: float, handed: int) -> UnitRecord:
        """Publish shards and accounts, then answers, then the record that makes all of it count.

        `handed` rows came from the source: every one must have arrived here. Raises UserError,
        before anything is published, where too many are unusable: better now than after a night.
        """
        assert self.read == handed, f"{self.unit.source}: {self.read} of {handed} rows accounted"
        self._check_rejections(max_reject_fraction)
        shards = tuple(
            spool.publish(self.cache, self.unit.name) for _, spool in sorted(self.spools.items())
        )
        samples, digest = self._publish_accounts()
        record = UnitRecord(
            name=self.unit.name,
            source=self.unit.source,
            source_state=self.unit.state,
            shards=shards,
            samples=samples,
            samples_sha256=digest,
            read=self.read,
            written=sum(shard.count for shard in shards),
            rejected=dict(sorted(self.rejected.items())),
            truncated_captions=self.truncated_captions,
            sums=self.sums.added(),
            notes={"fp32_retries": self.fp32_retries} if self.fp32_retries else {},
            generation=self.generation,
        )
        if self.answers is not None:
            self.answers.commit(shards)
        commit_unit(self.cache, record)
        return record

    def close(self) -> None:
        """Remove the spools, whether or not they were published."""
        for spool in self.spools.values():
            spool.close()
        if self.answers is not None:
            self.answers.close()

    def _check_rejections(self, max_reject_fraction: float) -> None:
        unusable = Counter({r: n for r, n in self.rejected.items() if not is_filter(r)})
        filtered = self.rejected.total() - unusable.total()
        count, read = unusable.total(), self.read - filtered
        if count > max_reject_fraction * read:
            reason, times = unusable.most_common(1)[0]
            raise UserError(
                f"{self.unit.source}: {count} of {counted(read, 'row')} rejected, {times} of "
                f"them for {reason!r} (first: {self.examples[reason]!r}); mend the source or raise "
                f"--max-reject-fraction (now {max_reject_fraction})"
            )

    def _publish_accounts(self) -> tuple[str, str]:
        rows = pa.Table.from_batches(self.accounts, ACCOUNT).combine_chunks()
        self.accounts.clear()  # so that only one copy is held
        order = pc.sort_indices(rows["key"])
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, ACCOUNT, compression="zstd") as file:
            for start in range(0, max(1, len(order)), ROW_GROUP):
                file.write_table(rows.take(order[start : start + ROW_GROUP]))
        with staged([buffer.getbuffer()], self.cache.tmp) as (file, digest):
            name = f"{self.unit.name}-{digest[:12]}.parquet"
            move(file, self.cache.samples / name)
        return f"samples/{name}", digest
