"""Samples and rejected rows of a cache, a page at a time.

Only what is shown is read. To look for words, records are read one after the other for a few
seconds at the most, and what was looked through is said.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import pyarrow.compute as pc
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from prep.cache.accounts import account_batches
from prep.inspect.charts import read_mean
from shared.cache.manifest import Manifest, iterate_units, open_manifest
from shared.cache.paths import CachePaths
from shared.cache.units import Shard
from shared.errors import UserError
from shared.models.vae import decode_latents
from shared.wording import counted

T = TypeVar("T")

PAGE = 12  # samples
ROWS = 50  # rejected rows
SECONDS = 4.0  # of looking for words
OFTEN = 256  # items between two looks at the clock
REJECTED = "rejected"  # in the column status


@dataclass(frozen=True)
class Sample:
    """A sample as it is shown."""

    shard: Shard
    index: int  # within the shard
    key: str
    captions: tuple[str, ...]
    height: int  # in pixels
    width: int
    heldout: bool

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.shard.layout.latent_size

    @property
    def caption(self) -> str:
        """The first one."""
        return self.captions[0] if self.captions else ""


@dataclass(frozen=True)
class Row:
    """A row of the sources that is not in the cache."""

    source_key: str
    caption: str
    reason: str


@dataclass(frozen=True)
class Found(Generic[T]):
    """What is on one page, and what is known of the others."""

    items: Sequence[T]
    first: int  # number of the first one, from 0
    more: bool  # on later pages
    looked: str  # through how much, in words


@dataclass(frozen=True)
class Browser:
    """A finished cache."""

    cache: CachePaths
    manifest: Manifest

    @staticmethod
    def open(cache: CachePaths) -> Browser:
        """Read the manifest. Raises UserError where there is none."""
        return Browser(cache, open_manifest(cache.root, check_sizes=False))

    @property
    def count(self) -> int:
        """Of samples."""
        return sum(shard.count for shard in self.manifest.shards)

    @property
    def rejected(self) -> int:
        """Rows that are not in the cache."""
        return sum(self.manifest.totals.rejected.values())

    def samples(self, page: int, text: str = "") -> Found[Sample]:
        """Samples of a page, counted from 0; with `text`, of those whose caption has it.

        Raises UserError where the cache is damaged.
        """
        try:
            if text:
                return search(
                    self._every_sample(), lambda one: has(text, *one.captions),
                    page * PAGE, PAGE, self.count, "sample",
                )  # fmt: skip
            first = min(page * PAGE, self.count)
            numbers = range(first, min(first + PAGE, self.count))
            items = [sample for n in numbers for sample in self._samples(*self._place(n))]
            return Found(items, first, numbers.stop < self.count, counted(self.count, "sample"))
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None

    def rows(self, page: int, text: str = "") -> Found[Row]:
        """Rejected rows of a page, as `samples`; words are looked for in all that is shown."""
        return search(
            self._every_row(), lambda row: has(text, row.source_key, row.caption, row.reason),
            page * ROWS, ROWS, self.rejected, "rejected row",
        )  # fmt: skip

    def picture(self, sample: Sample, vae: AutoencoderKL) -> NDArray[np.uint8]:
        """What a sample's latents decode to, `[H, W, 3]`. Raises UserError for damage."""
        channels, (height, width) = self.manifest.identity.vae.channels, sample.latent_size
        try:
            mean = read_mean(self.cache, sample.shard, sample.index, channels)
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        latents = torch.from_numpy(mean.astype(np.float32)).view(1, channels, height, width)
        with torch.inference_mode():
            pixels: NDArray[np.uint8] = decode_latents(vae, latents)[0]
        return pixels

    def _place(self, number: int) -> tuple[Shard, int]:
        """The shard that has the sample of a number, and where in it."""
        shards = self.manifest.shards
        ends = list(itertools.accumulate(shard.count for shard in shards))
        at = bisect_right(ends, number)
        return shards[at], number - ends[at] + shards[at].count

    def _every_sample(self) -> Iterator[Sample]:
        for shard in self.manifest.shards:
            yield from self._samples(shard, 0, shard.count)

    def _samples(self, shard: Shard, start: int, count: int = 1) -> Iterator[Sample]:
        """Read the records of some samples of a shard, and nothing else of them."""
        layout, downscale = shard.layout, self.manifest.identity.vae.downscale
        height, width = layout.latent_size
        with (self.cache.root / shard.file).open("rb", buffering=0) as file:
            for index in range(start, start + count):
                file.seek(index * layout.stride)
                key, record = layout.unpack_head(file.read(layout.head_bytes))
                captions = record.get("captions")
                texts = captions if isinstance(captions, list) else []
                yield Sample(
                    shard, index, key, tuple(one for one in texts if isinstance(one, str)),
                    height * downscale, width * downscale, index in shard.heldout,
                )  # fmt: skip

    def _every_row(self) -> Iterator[Row]:
        for unit in iterate_units(self.cache):
            for batch in account_batches(self.cache.root / unit.samples) if unit.rejected else ():
                if not {"status", "reason", "source_key", "captions"} <= set(batch.schema.names):
                    break
                for row in batch.filter(pc.equal(batch["status"], REJECTED)).to_pylist():
                    captions = row["captions"] or [""]
                    yield Row(row["source_key"] or "", captions[0] or "", row["reason"] or "")

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"{self.cache.root} is damaged ({error}); `python -m prep verify` lists where"
        )


def has(text: str, *texts: str) -> bool:
    """Do the words stand in one of the texts, in whatever case?"""
    wanted = text.casefold()
    return any(wanted in one.casefold() for one in texts)


def search(
    candidates: Iterator[T], wanted: Callable[[T], bool], first: int, size: int, total: int,
    what: str,
) -> Found[T]:  # fmt: skip
    """The items from number `first` that are wanted, found within SECONDS."""
    deadline = time.monotonic() + SECONDS
    items, matching, looked = list[T](), 0, 0
    for looked, one in enumerate(candidates, 1):
        if wanted(one):
            matching += 1
            if matching > first + size:
                return Found(items, first, True, "")
            if matching > first:
                items.append(one)
        if looked % OFTEN == 0 and time.monotonic() > deadline:
            cut = f"looked through the first {looked:,} of {counted(total, what)}, then time was up"
            return Found(items, first, False, cut)
    return Found(items, first, False, f"{matching:,} of {counted(total, what)}")
