"""Ways to read 151 kB samples: this project's, and those that it is compared with.

Each takes the places of the samples that it shall read and returns when all are in memory as
arrays; webdataset, which knows no places, reads as many from the start.
"""

from __future__ import annotations

import importlib.util
import itertools
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from shared.cache.conditioning import TextEmbeds
from shared.cache.draws import DrawSpec
from shared.cache.layout import TRAILER, cache_layout
from shared.cache.units import Shard
from train.data.batch import Slot, allocate
from train.data.bucket import Bucket
from train.data.loader import LatentSpec, Loader
from train.data.order import Order
from train.data.prefetch import Ring

LAYOUT = cache_layout((1, 4, 64, 64), (1, 77, 768))  # SD1.5 at 512 px, mean only
FIELDS = LAYOUT.fields
PAYLOAD = sum(field.nbytes for field in FIELDS)
ANSWER = 2 * FIELDS[0].nbytes  # conditional and unconditional
BATCH = 16
PLACES = 5

Read = Callable[[Sequence[int]], object]


class Samples:
    """A synthetic cache: `count` samples in shards of 1,000, and a few in other formats."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        rng = np.random.default_rng(0)
        self.shards = []
        (folder / "shards").mkdir()
        for start in range(0, count, 1000):
            self.shards.append(self._write_shard(rng, start, min(1000, count - start)))
        self.paths = [folder / shard.file for shard in self.shards]
        self.bucket = Bucket(folder, LAYOUT, self.shards)
        self.resident = rng.integers(0, 255, (2000, PAYLOAD), dtype=np.uint8)

    def _write_shard(self, rng: np.random.Generator, first: int, count: int) -> Shard:
        path = self.folder / "shards" / f"{first}.tar"
        with path.open("wb") as file:
            for number in range(first, first + count):
                arrays = {
                    field.name: rng.standard_normal(field.shape, dtype=np.float32)
                    for field in LAYOUT.fields
                }
                file.write(LAYOUT.pack(f"{number:016x}", {"num_captions": 1}, arrays))
            file.write(TRAILER)
            file.flush()
            os.fsync(file.fileno())  # only clean pages can be evicted
        return Shard(f"shards/{path.name}", LAYOUT, count, path.stat().st_size, "")

    def write_parquet(self, rows: int) -> None:
        """The first rows as parquet, a batch to a row group."""
        columns: dict[str, list[bytes]] = {field.name: [] for field in LAYOUT.fields}
        for number in range(rows):
            for field in LAYOUT.fields:
                into = np.empty(field.shape[1:], field.dtype)
                self.bucket.read(number, field.name, 0, into)
                columns[field.name].append(into.tobytes())
        table = pa.table(
            {
                field.name: pa.array(columns[field.name], pa.binary(field.nbytes))
                for field in LAYOUT.fields
            }
        )
        pq.write_table(
            table, self.folder / "samples.parquet", row_group_size=BATCH, compression="none",
            use_dictionary=False,
        )  # fmt: skip

    def place(self, number: int) -> tuple[Path, int]:
        """File and offset of the bytes that hold a sample's arrays."""
        shard, start = self.bucket.locate(number)
        return self.paths[shard], start + LAYOUT.offsets["latents"]


WANTED = LAYOUT.offsets["prompt_embeds"] - LAYOUT.offsets["latents"] + LAYOUT.fields[1].nbytes


def places(answers: torch.dtype | None = None) -> list[list[Slot]]:
    """The loader's memory."""
    return [allocate([LAYOUT], 4, BATCH, False, answers) for _ in range(PLACES)]


def memcpy(samples: Samples, fresh: bool = False, answers: bool = False) -> Read:
    """The same bytes from memory into as many slots as the loader has: the yardstick.

    Slots stay in the processor's cache; `fresh` copies to a place of its own for each sample, and
    with `answers` as many bytes more as one has are copied.
    """
    slots = np.ones((800 if fresh else PLACES * BATCH, PAYLOAD), np.uint8)
    beside = np.ones((PLACES * BATCH, ANSWER), np.uint8)

    def read(ids: Sequence[int]) -> None:
        for turn, number in enumerate(ids):
            slots[turn % len(slots)] = samples.resident[number % len(samples.resident)]
            if answers:
                more = samples.resident[(number + 1) % len(samples.resident)]
                beside[turn % len(beside)] = more[:ANSWER]

    return read


def ours(samples: Samples, threads: int) -> Read:
    """The loader's reader and ring, without draws and conversions."""
    memory = places()

    def read(ids: Sequence[int]) -> None:
        def fill(index: int, place: list[Slot]) -> None:
            rows, views, spans = (("latents", 0), ("prompt_embeds", 0)), place[0].views, []
            for at, number in enumerate(ids[index * BATCH :][:BATCH]):
                into = [views["latents"][at], views["prompt_embeds"][at]]
                spans += samples.bucket.spans(number, rows, into)
            samples.bucket.finish(samples.bucket.start(spans))

        with closing(Ring(fill, memory, threads).run(0)) as stream:
            for _ in range(0, len(ids), BATCH):
                next(stream)

    return read


def loader(samples: Samples, threads: int) -> Read:
    """The whole loader as the trainer uses it: order, draws, noise, scaling, checks."""
    spec = DrawSpec(0, 1, 50, 5.0, 15.0, 0.0, latent_noise=False)
    empty = TextEmbeds(torch.zeros(1, 77, 768, dtype=torch.float16))
    latents = LatentSpec(4, 0.18215)
    order = Order((samples.count,), BATCH, 0)
    turn = itertools.count()

    def read(ids: Sequence[int]) -> None:
        start = next(turn) * 1000
        run = Loader([samples.bucket], order, spec, latents, empty, start, threads=threads)
        with closing(run.batches()) as stream:
            for _ in range(0, len(ids), BATCH):
                next(stream)

    return read


def webdataset(samples: Samples) -> Read:
    """Stock webdataset, npy members decoded."""
    import webdataset as wds

    def read(ids: Sequence[int]) -> None:
        stream = wds.WebDataset([str(path) for path in samples.paths], shardshuffle=False)
        for _ in itertools.islice(stream.decode(), len(ids)):
            pass

    return read


class _Places(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, samples: Samples, ids: Sequence[int]) -> None:
        self.places = [samples.place(number) for number in ids]
        self.files: dict[Path, int] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        path, offset = self.places[index]
        if path not in self.files:
            self.files[path] = os.open(path, os.O_RDONLY)
        gap = bytearray(LAYOUT.offsets["prompt_embeds"] - LAYOUT.offsets["latents"] - 32_768)
        arrays = {f.name: np.empty(f.shape[1:], f.dtype) for f in LAYOUT.fields}
        into: list[Any] = [arrays["latents"], gap, arrays["prompt_embeds"]]
        os.preadv(self.files[path], into, offset)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def dataloader(samples: Samples, workers: int) -> Read:
    """torch's DataLoader with worker processes that `preadv`.

    They live on between calls and have two batches each ready, which is in their favour.
    """
    dataset = _Places(samples, range(samples.count))
    order = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**7)
    stream = iter(torch.utils.data.DataLoader(dataset, BATCH, sampler=order, num_workers=workers))

    def read(ids: Sequence[int]) -> None:
        for _ in range(0, len(ids), BATCH):
            next(stream)

    return read


def mds(samples: Samples, workers: int) -> Read:
    """mosaicml-streaming's own format and shuffle, in a DataLoader with worker processes.

    Raises ImportError where the package is not at hand.
    """
    streaming = import_streaming()
    folder = samples.folder / f"mds-{workers}"
    names = {field.name: f"ndarray:float16:{','.join(map(str, field.shape))}" for field in FIELDS}
    with streaming.MDSWriter(out=str(folder), columns=names) as writer:
        for number in range(1600):
            row = {field.name: np.empty(field.shape, field.dtype) for field in FIELDS}
            for name, array in row.items():
                samples.bucket.read(number, name, 0, array[0])
            writer.write(row)
    dataset = streaming.StreamingDataset(
        local=str(folder), shuffle=True, batch_size=BATCH, epoch_size=100_000
    )
    stream = iter(torch.utils.data.DataLoader(dataset, BATCH, num_workers=workers))

    def read(ids: Sequence[int]) -> None:
        for _ in range(0, len(ids), BATCH):
            next(stream)

    return read


def import_streaming() -> ModuleType:
    """`streaming.base` alone: the package's front door imports torchvision, which it can spare."""
    if "streaming" not in sys.modules:
        found = importlib.util.find_spec("streaming")
        if found is None:
            raise ImportError("no module named streaming")
        package = ModuleType("streaming")
        package.__path__ = list(found.submodule_search_locations or ())
        sys.modules["streaming"] = package
    return importlib.import_module("streaming.base")


def parquet(samples: Samples) -> Read:
    """Row groups in random order."""
    memory = places()

    def read(ids: Sequence[int]) -> None:
        file = pq.ParquetFile(samples.folder / "samples.parquet")
        groups = file.num_row_groups
        for turn, number in enumerate(ids[::BATCH]):
            table = file.read_row_group(number % groups)
            slot = memory[turn % PLACES][0]
            for field, name in zip(LAYOUT.fields, ("raw", "prompt_embeds"), strict=True):
                data = table[field.name].chunk(0).buffers()[1]
                slot.arrays[name].reshape(-1)[:] = np.frombuffer(data, "<f2")

    return read


def mmap_random(samples: Samples) -> Read:
    """Slices of mapped files."""
    memory = np.empty((PLACES * BATCH, WANTED), np.uint8)

    def read(ids: Sequence[int]) -> None:
        maps = {}
        for path in samples.paths:
            with path.open("rb") as file:
                maps[path] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            maps[path].madvise(mmap.MADV_RANDOM)
        for turn, number in enumerate(ids):
            path, offset = samples.place(number)
            memory[turn % len(memory)] = np.frombuffer(maps[path], np.uint8, WANTED, offset)

    return read


def preadv(samples: Samples, threads: int) -> Read:
    """`preadv` and nothing else, the samples dealt out to threads."""

    def read(ids: Sequence[int]) -> None:
        files = {path: os.open(path, os.O_RDONLY) for path in samples.paths}

        def some(part: Iterator[int]) -> None:
            memory = bytearray(WANTED)
            for number in part:
                path, offset = samples.place(number)
                assert os.preadv(files[path], [memory], offset) == WANTED

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(some, [iter(ids[n::threads]) for n in range(threads)]))
        for file in files.values():
            os.close(file)

    return read
