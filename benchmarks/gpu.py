"""Both stages at real size on one GPU: `make bench-gpu`, or `python -m benchmarks.gpu`.

SD1.5 at 512 and SDXL at 1024 px, LoRA and full, bf16 and fp16, with and without --compile, all
with random weights: samples per second and peak memory of the trainer, of an online baseline in
the same run, the share of the measured matmul ceiling, and the encoders' images per second. Takes
at most nine minutes; what did not fit is listed as not measured, and the file is written after
every row. A row that is not done when the time is up is given up; compilation, which nothing else
can interrupt, has processes of its own, which are ended. `--tiny --device cpu` tries all of it on a
CPU and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.gpu_rows import Bench, Row, matmul_tflops, measure, release, share_of_matmul
from benchmarks.common.machine import save
from shared.machine.device import pick_device
from shared.networks.precision import DTYPES

# The most telling rows first: on a slow machine the last ones are left out.
ORDER = (
    ("lora", "bf16", False),
    ("full", "bf16", False),
    ("encode", "fp16", False),
    ("lora", "bf16", True),
    ("lora", "fp16", False),
    ("full", "fp16", False),
    ("encode", "bf16", False),
    ("full", "bf16", True),
    ("lora", "fp16", True),
    ("full", "fp16", True),
)
EXPECTED = {False: 25.0, True: 60.0}  # seconds of an sd15 row, with --compile or not
LARGER = 3.0  # SDXL's rows, in sd15's
COMPILED = 150.0  # seconds at most of a row with --compile
REPO = Path(__file__).resolve().parent.parent


def rows(models: tuple[str, ...]) -> list[Row]:
    """All rows, in the order of `ORDER`."""
    return [Row(model, *kind) for kind in ORDER for model in models]


def open_bench(tiny: bool, device: torch.device, root: Path, threads: int | None) -> Bench:
    """Real sizes, or the project's tiny models in their place."""
    if tiny:
        return Bench(
            device, root, {"tiny-sd": 64, "tiny-xl": 64}, {"tiny-sd": 2, "tiny-xl": 2},
            pairs=1, block=0.0, matmul=256, threads=threads,
        )  # fmt: skip
    return Bench(
        device, root, {"sd15": 512, "sdxl": 1024}, {"sd15": 8, "sdxl": 4},
        pairs=3, block=1.0, matmul=8192, threads=threads,
    )  # fmt: skip


class Table:
    """The rows measured so far, and what is left to do until the time is up."""

    def __init__(self, wanted: list[Row], minutes: float, write: bool) -> None:
        self.wanted, self.write = wanted, write
        self.began = time.perf_counter()
        self.until = self.began + 60 * minutes
        self.figures: dict[str, Any] = {"matmul_tflops": {}, "rows": {}}
        self.figures["not_measured"] = [row.name for row in wanted]
        self.took: dict[tuple[str, bool], float] = {}

    def measure(self, bench: Bench) -> None:
        """Measure row after row."""
        ceiling = {precision: matmul_tflops(precision, bench) for precision in DTYPES}
        self.figures["matmul_tflops"] = ceiling
        for row in self.wanted:
            began = time.perf_counter()
            if began + self.expected(row) > self.until:
                continue
            try:
                if row.compile:
                    found = in_child(row, bench, min(self.until - began, COMPILED))
                    found |= share_of_matmul(row, bench, found, ceiling[row.precision])
                else:
                    with at_most(self.until - began):
                        found = measure(row, bench, ceiling[row.precision])
            except Exception as error:  # one row costs no other its place
                found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            release(bench.device)
            took = time.perf_counter() - began
            kind = row.model, row.compile
            self.took[kind] = max(took, self.took.get(kind, 0.0))
            self.add(row, vars(row) | found | {"took_seconds": took})

    def expected(self, row: Row) -> float:
        """Seconds: what such a row has taken, else a guess, for SDXL from sd15's."""
        if (row.model, row.compile) in self.took:
            return self.took[row.model, row.compile]
        smaller = self.took.get(("sd15", row.compile), EXPECTED[row.compile])
        guess = smaller * (LARGER if row.model == "sdxl" else 1.0)
        return min(guess, COMPILED) if row.compile else guess

    def add(self, row: Row, found: dict[str, Any]) -> None:
        """Note a row, write the file anew."""
        measured = self.figures["rows"]
        measured[row.name] = found
        self.figures["not_measured"] = [r.name for r in self.wanted if r.name not in measured]
        self.figures["total_seconds"] = time.perf_counter() - self.began
        print(line(row, found), flush=True)
        if self.write:
            save("real-size", self.figures)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def expired(*_: object) -> None:
        raise TimeoutError("not done when the time was up")

    former = signal.signal(signal.SIGALRM, expired)
    left, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, former)


def in_child(row: Row, bench: Bench, seconds: float) -> dict[str, Any]:
    """What `measure` finds in a process that is ended, with all that it started, in time."""
    options = ["--device", str(bench.device), "--only", row.name, "--child", str(bench.root)]
    options += ["--threads", str(bench.threads)] if bench.threads else []
    options += ["--tiny"] if row.model.startswith("tiny") else []
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    # A file: inductor's processes hold a pipe open longer than the one that is waited for.
    with tempfile.TemporaryFile() as answer:
        process = subprocess.Popen(command, cwd=REPO, stdout=answer, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} seconds"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        answer.seek(0)
        lines = answer.read().decode().splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if status == 0 else {"failed": f"exit {status}"}
    return found


def child(row: Row, bench: Bench) -> None:
    """What `in_child` starts: the row as JSON."""
    try:
        found = measure(row, bench, ceiling=1.0)  # the shares of it are the parent's to tell
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(found))


def line(row: Row, found: dict[str, Any]) -> str:
    """A row for people."""
    if "failed" in found:
        return f"{row.name:27} failed: {found['failed']}"
    if "out_of_memory" in found:
        return f"{row.name:27} out of memory with one sample"
    words = [f"{row.name:27} batch {found['batch']}, {found['peak_gb']:.1f} GB"]
    if row.student == "encode":
        words.append(f"{found['images_per_second']:.1f} images/s")
        words.append(f"VAE {found['vae_of_matmul']:.0%} of matmul")
        return ", ".join(words)
    words.append(f"{found['samples_per_second']:.2f} samples/s")
    words.append(f"{found['to_resident']:.3f} of a resident batch's step")
    if "of_matmul" in found:
        words.append(f"{found['of_matmul']:.0%} of matmul")
    if "online" in found:
        online = found["online"]
        if "ratio" in online:
            words.append(
                f"online {online['ratio']:.2f} times as long ({online['ratio_by_flops']:.2f} by "
                f"FLOP), {online['peak_gb']:.1f} GB"
            )
        else:
            words.append("online out of memory")
    return ", ".join(words)


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Measure what fits into the time; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--only", default="", help="rows whose name holds this, e.g. 'sd15 lora'")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--threads",
        type=int,
        help="CPU threads of the networks",
    )
    parser.add_argument("--tiny", action="store_true", help="the tiny models; writes no file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    device = pick_device(args.device)
    if device.type == "cpu" and not args.tiny:
        print("no CUDA device here, nothing to measure (--tiny --device cpu tries the code)")
        return {}
    models = ("tiny-sd", "tiny-xl") if args.tiny else ("sd15", "sdxl")
    wanted = [row for row in rows(models) if args.only in row.name]
    if args.child:
        child(wanted[0], open_bench(args.tiny, device, args.child, args.threads))
        return {}
    table = Table(wanted, args.minutes, not args.tiny)
    with tempfile.TemporaryDirectory() as folder:
        table.measure(open_bench(args.tiny, device, Path(folder), args.threads))
    left = table.figures["not_measured"]
    print(f"not measured: {', '.join(left)}" if left else "all rows measured")
    return table.figures


if __name__ == "__main__":
    main()
