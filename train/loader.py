"""Batches from a cache: threads read exactly the bytes a step wants, straight into batch slots.

No worker processes and no mmap: both were measured several times slower (docs/loader.md).
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.cache import Manifest, Shard
from shared.conditioning import TextEmbeds
from shared.errors import UserError
from shared.layout import BLOCK, Layout
from train.draws import Draw, DrawSpec, draw
from train.order import Order

AHEAD = 4  # batches being filled while one is in use


@dataclass(frozen=True)
class Batch:
    """What one step needs, B samples of one latent size."""

    latents: Tensor  # [B, C, h, w] fp32: x0, sampled from the posterior and scaled
    prompt_embeds: Tensor  # [B, L, D] fp16
    pooled_prompt_embeds: Tensor | None  # [B, P] fp16
    time_ids: Tensor | None  # [B, 6] int32
    noise: Tensor  # [B, C, h, w] fp32
    index: Tensor  # [B] int64, solver interval
    w: Tensor  # [B] fp32, guidance

    @property
    def text(self) -> TextEmbeds:
        """The captions' embeddings."""
        return TextEmbeds(self.prompt_embeds, self.pooled_prompt_embeds)

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`; on the CPU the batch itself."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: None if v is None else v.to(device) for k, v in moved.items()})


@dataclass(frozen=True)
class LatentSpec:
    """How raw latents become x0: C channels, multiplied by the VAE's scaling factor."""

    channels: int
    scaling_factor: float


class Bucket:
    """The shards of one layout as one array of samples."""

    def __init__(self, root: Path, layout: Layout, shards: Sequence[Shard]) -> None:
        self.layout = layout
        self.paths = [root / shard.file for shard in shards]
        self.ends = np.cumsum([shard.count for shard in shards])
        self._files: dict[int, int] = {}
        self._opening = threading.Lock()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, number: int) -> tuple[int, int]:
        """Shard and byte offset of a sample."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        first = int(self.ends[shard - 1]) if shard else 0
        return shard, (number - first) * self.layout.stride

    def read(self, number: int, name: str, row: int, into: NDArray[Any]) -> None:
        """Row `row` of a sample's field into a contiguous array. Raises UserError where it ends."""
        shard, start = self.locate(number)
        field = self.layout.field(name)
        assert field is not None
        offset = start + self.layout.offsets[name] + row * (field.nbytes // field.shape[0])
        self._fill(shard, offset, memoryview(into).cast("B"), number)

    def record(self, number: int) -> dict[str, Any]:
        """A sample's KEY.json."""
        shard, start = self.locate(number)
        buffer = bytearray(self.layout.record_bytes)
        self._fill(shard, start + BLOCK, memoryview(buffer), number)
        return dict(json.loads(buffer))

    def name(self, number: int) -> str:
        """How errors call a sample."""
        shard, start = self.locate(number)
        return f"{self.paths[shard]} sample {start // self.layout.stride}"

    def _fill(self, shard: int, offset: int, view: memoryview, number: int) -> None:
        with self._opening:
            if shard not in self._files:
                try:
                    self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
                except FileNotFoundError:
                    raise UserError(
                        f"{self.paths[shard]} was removed after the cache was opened; run the "
                        "same command again, which opens the cache as it is now"
                    ) from None
        if os.preadv(self._files[shard], [view], offset) != len(view):
            raise UserError(f"{self.name(number)} is cut short; `prep verify` lists the damage")

    def close(self) -> None:
        """Close the shards."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def open_buckets(root: Path, manifest: Manifest) -> list[Bucket]:
    """A bucket for each layout of the manifest, in its order."""
    shards: list[list[Shard]] = [[] for _ in manifest.layouts]
    for shard, number in zip(manifest.shards, manifest.shard_layouts, strict=True):
        shards[number].append(shard)
    return [
        Bucket(root, layout, mine) for layout, mine in zip(manifest.layouts, shards, strict=True)
    ]


class Loader:
    """Iterates over a rank's batches from global batch `start` on, without end.

    A yielded batch is valid until the next one is asked for: its memory is then filled again.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        order: Order,
        spec: DrawSpec,
        latents: LatentSpec,
        unconditional: TextEmbeds,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
    ) -> None:
        self.buckets, self.order, self.spec = buckets, order, spec
        self.latents, self.unconditional = latents, unconditional
        self.start, self.rank, self.world, self.threads = start, rank, world, threads

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self) -> Generator[Batch, None, None]:
        """The endless stream; closing it ends the threads."""
        slots = [self._allocate() for _ in range(AHEAD + 1)]
        with ThreadPoolExecutor(self.threads, thread_name_prefix="loader") as pool:
            waiting: deque[Future[Batch]] = deque()
            try:
                for index in range(self.start, self.start + AHEAD):
                    waiting.append(pool.submit(self.fill, index, slots[index % len(slots)]))
                while True:
                    batch = waiting.popleft().result()
                    index += 1
                    # The slot of the batch that was in use until now is free again.
                    waiting.append(pool.submit(self.fill, index, slots[index % len(slots)]))
                    yield batch
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def names(self, index: int) -> list[str]:
        """How errors call the samples of global batch `index`."""
        bucket, ids = self.order.batch(index)
        return [self.buckets[bucket].name(int(sample)) for sample in ids]

    def fill(self, index: int, slot: dict[int, Batch]) -> Batch:
        """Read global batch `index` into `slot`. Raises UserError for a damaged sample."""
        number, ids, positions = self.order.rank_batch(index, self.rank, self.world)
        batch = slot[number]
        for row, (sample, position) in enumerate(zip(ids, positions, strict=True)):
            self._fill_sample(batch, row, self.buckets[number], int(sample), int(position))
        return batch

    def _fill_sample(
        self, batch: Batch, row: int, bucket: Bucket, sample: int, position: int
    ) -> None:
        noise = batch.noise[row].numpy()
        drawn = draw(self.spec, position, self._num_captions(bucket, sample), noise.shape)
        noise[...] = drawn.noise
        batch.index[row] = drawn.index
        batch.w[row] = drawn.w
        latents = np.empty(bucket.layout.fields[0].shape[1:], dtype=np.float16)
        bucket.read(sample, "latents", drawn.view, latents)
        batch.latents[row] = torch.from_numpy(
            finished_latents(latents, drawn, self.latents.scaling_factor)
        )
        self._fill_text(batch, row, bucket, sample, drawn)
        if batch.time_ids is not None:
            bucket.read(sample, "time_ids", drawn.view, batch.time_ids[row].numpy())
        filled = (batch.latents, batch.prompt_embeds, batch.pooled_prompt_embeds)
        if not all(part is None or part[row].isfinite().all() for part in filled):
            raise UserError(f"{bucket.name(sample)} holds non-finite values; see `prep verify`")

    def _fill_text(self, batch: Batch, row: int, bucket: Bucket, sample: int, drawn: Draw) -> None:
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            into: Tensor | None = getattr(batch, name)
            if into is None:
                continue
            if drawn.drop_caption:
                into[row] = getattr(self.unconditional, name)[0]
            else:
                bucket.read(sample, name, drawn.caption, into[row].numpy())

    def _num_captions(self, bucket: Bucket, sample: int) -> int:
        field = bucket.layout.field("prompt_embeds")
        assert field is not None
        # Where one caption is kept, the record need not be read to know how many there are.
        return 1 if field.shape[0] == 1 else int(bucket.record(sample)["num_captions"])

    def _allocate(self) -> dict[int, Batch]:
        share = self.order.batch_size // self.world
        channels = self.latents.channels
        return {n: _empty_batch(b.layout, channels, share) for n, b in enumerate(self.buckets)}


def finished_latents(
    raw: NDArray[np.float16], drawn: Draw, scaling_factor: float
) -> NDArray[np.float32]:
    """x0 `[C, h, w]` from the stored mean, or mean and logvar: sampled and scaled in fp32."""
    values = raw.astype(np.float32)
    if drawn.latent_noise is not None:
        mean, logvar = np.split(values, 2)
        values = mean + np.exp(0.5 * logvar) * drawn.latent_noise
    return values * np.float32(scaling_factor)


def _empty_batch(layout: Layout, channels: int, size: int) -> Batch:
    """Unfilled tensors for `size` samples."""

    def rows(name: str, dtype: torch.dtype) -> Tensor | None:
        field = layout.field(name)
        return None if field is None else torch.empty((size, *field.shape[1:]), dtype=dtype)

    latents = torch.empty(size, channels, *layout.latent_size)
    return Batch(
        latents=latents,
        prompt_embeds=rows("prompt_embeds", torch.float16),
        pooled_prompt_embeds=rows("pooled_prompt_embeds", torch.float16),
        time_ids=rows("time_ids", torch.int32),
        noise=torch.empty_like(latents),
        index=torch.empty(size, dtype=torch.int64),
        w=torch.empty(size),
    )
