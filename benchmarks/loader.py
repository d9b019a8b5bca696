"""How fast are samples read, beside what the disk and the memory can do and what others do?

`python -m benchmarks.loader` writes a synthetic cache of SD1.5-size samples (151 kB each) and
reads it, all contenders in every round, in an order of its own; figures are medians over rounds.
Each is short, so that on a busy machine most are not interrupted.

- warm: everything in the page cache. `ratio` is to a memcpy of the same bytes into the same slots.
  `ours` is the loader's reader and ring; `ours, with draws` is all that training waits for, of
  which drawing the noise takes most; `with an answer` reads one of the teacher's, too, and the
  sample's key before it, and is compared with a memcpy of as many bytes (its MB are the sample's).
- cold: the page cache is evicted before each contender, proven by mincore (`resident` is what was
  left of it). `ratio` is to the best of the plain read patterns of the same round.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import readers
from benchmarks.common.answers_reader import ours_with_answers
from benchmarks.common.machine import record
from data.arguments import local_argument

PLAIN = ("mmap, random", "preadv, 1 thread", "preadv, 4 threads", "preadv, 16 threads")


def timed(read: readers.Read, ids: list[int]) -> tuple[float, float]:
    """Samples a second, and a second of this process's own computing."""
    start, cpu = time.perf_counter(), time.process_time()
    read(ids)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return len(ids) / wall, len(ids) / max(cpu, 1e-9)


def warm(samples: readers.Samples, rounds: int) -> dict[str, Any]:
    """Rates and ratios to a memcpy, everything in the page cache."""
    contenders = {
        "memcpy": (readers.memcpy(samples), 800),
        "memcpy to fresh places": (readers.memcpy(samples, fresh=True), 800),
        "ours, 1 thread": (readers.ours(samples, 1), 800),
        "ours, 2 threads": (readers.ours(samples, 2), 800),
        "ours, 4 threads": (readers.ours(samples, 4), 800),
        "ours, with draws, 1 thread": (readers.loader(samples, 1), 800),
        "ours, with draws, 4 threads": (readers.loader(samples, 4), 800),
        "memcpy, with an answer": (readers.memcpy(samples, answers=True), 800),
        "ours, with an answer, 1 thread": (ours_with_answers(samples, 1), 800),
        "ours, with an answer, 4 threads": (ours_with_answers(samples, 4), 800),
        "preadv, 1 thread": (readers.preadv(samples, 1), 800),
        "mmap, random": (readers.mmap_random(samples), 800),
        "webdataset": (readers.webdataset(samples), 200),
        "DataLoader over preadv, 1 worker": (readers.dataloader(samples, 1), 800),
        "DataLoader over preadv, 2 workers": (readers.dataloader(samples, 2), 800),
        "parquet": (readers.parquet(samples), 800),
        **mds(samples),
    }
    readers.preadv(samples, 2)(range(samples.count))
    rng = np.random.default_rng(1)
    for read, _ in contenders.values():
        read(rng.permutation(samples.count)[:64].tolist())
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in rng.permutation(list(contenders)).tolist():
            read, count = contenders[name]
            rates[name].append(timed(read, rng.permutation(samples.count)[:count].tolist()))
    found = {}
    for name, rate in rates.items():
        same = "memcpy, with an answer" if "with an answer" in name else "memcpy"
        found[name] = summary(rate, rates[same])
    for name in found:
        if name.startswith(("DataLoader", "MDS")):
            del found[name]["cpu_ratio"]  # its worker processes compute
    return found


def cold(samples: readers.Samples, rounds: int) -> dict[str, Any]:
    """Rates and ratios to the best plain pattern, nothing in the page cache."""
    contenders = {
        "ours, 2 threads": (readers.ours(samples, 2), 1600),
        "ours, 4 threads": (readers.ours(samples, 4), 1600),
        "ours, with draws, 4 threads": (readers.loader(samples, 4), 1600),
        "mmap, random": (readers.mmap_random(samples), 160),
        "preadv, 1 thread": (readers.preadv(samples, 1), 800),
        "preadv, 4 threads": (readers.preadv(samples, 4), 1600),
        "preadv, 16 threads": (readers.preadv(samples, 16), 1600),
    }
    rng = np.random.default_rng(2)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    left = 0.0
    for _ in range(rounds):
        for name in rng.permutation(list(contenders)).tolist():
            read, count = contenders[name]
            left = max(left, evict(samples.paths))
            rates[name].append(timed(read, rng.permutation(samples.count)[:count].tolist()))
    best = [max(found) for found in zip(*(rates[name] for name in PLAIN), strict=True)]
    found = {name: summary(found, best) for name, found in rates.items()}
    for row in found.values():
        del row["cpu_ratio"]  # here the disk is what is waited for
    return {**found, "resident": left}


def summary(
    rates: list[tuple[float, float]], reference: list[tuple[float, float]]
) -> dict[str, float]:
    """Medians of the rate, and of its ratio to the same round's reference.

    `cpu_ratio` compares processor time, which neighbours on a busy machine cannot take away: for
    one thread it is the ratio on a machine of one's own.
    """
    rate = statistics.median(wall for wall, _ in rates)
    pairs = list(zip(rates, reference, strict=True))
    return {
        "samples_per_second": round(rate),
        "mb_per_second": round(rate * readers.PAYLOAD / 1e6),
        "ratio": round(statistics.median(a[0] / b[0] for a, b in pairs), 3),
        "cpu_ratio": round(statistics.median(a[1] / b[1] for a, b in pairs), 3),
    }


def mds(samples: readers.Samples) -> dict[str, tuple[readers.Read, int]]:
    """mosaicml-streaming with one and two workers, where it is installed (docs/loader.md)."""
    try:
        return {
            "MDS, 1 worker": (readers.mds(samples, 1), 800),
            "MDS, 2 workers": (readers.mds(samples, 2), 800),
        }
    except ImportError:
        return {}


def evict(paths: list[Path]) -> float:
    """Drop the files from the page cache; the share of their pages that is still there."""
    pages = left = 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            # A private, writable mapping: ctypes takes the address of nothing else.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        found = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(address, len(mapped), found.ctypes.data) == 0, ctypes.get_errno()
        pages, left = pages + len(found), left + int((found & 1).sum())
    return left / pages


def main() -> None:
    """Write the samples, measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=local_argument, help="where to write 1.5 GB for a minute")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        samples = readers.Samples(Path(folder), args.samples)
        samples.write_parquet(1600)
        figures = {
            "bytes_per_sample": readers.PAYLOAD,
            "samples": args.samples,
            "batch": readers.BATCH,
            "rounds": args.rounds,
            "load": [round(load, 1) for load in os.getloadavg()],
            "warm": warm(samples, args.rounds),
            "cold": cold(samples, args.rounds // 2),
        }
    for part in ("warm", "cold"):
        print(part)
        for name, found in figures[part].items():
            print(f"  {name}: {found}")
    record("loader", figures)


if __name__ == "__main__":
    main()
