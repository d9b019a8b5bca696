"""Stage one: does the encoder wait, and does memory grow with the data?

`python -m benchmarks.prep` encodes a tar of the project's pictures, 20 such tars, and a tar of 20
times as many rows, each case in a process of its own, and prints

- encoder: the encoders' own rate on preloaded pictures and captions, measured before and after the
  pipeline's in the same process. On a GPU the pipeline should reach 0.95 of it.
- wall_by_work: wall seconds by those of the encoders alone plus all other CPU seconds divided by
  the cores; the latter are those of the same job with the networks left out. On a CPU, where
  decoding shares the cores with the encoders, at most 1.05 is wanted.
- memory: peak resident memory at 20 times the data, relative to that at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common.machine import record
from prep import commands
from prep.config import EncodeConfig
from prep.encode import networks
from prep.encode.networks import Encoders
from prep.encode.settings import choose_settings
from prep.encoders.text import TextEncoder
from prep.encoders.vae import Started, VaeEncoder
from prep.images.crop import prepare
from shared.machine import cpus
from shared.models.family import resolve_model

REPO = Path(__file__).resolve().parent.parent
SOURCES = sorted((REPO / "data" / "pictures" / "train").glob("*.tar"))
ALONE_SECONDS = 4


def write_rows(path: Path, first: int, rows: int) -> None:
    """A tar of `rows` samples, the project's pictures over and over under new names."""
    samples = list(originals())
    with tarfile.open(path, "w") as tar:
        for row in range(first, first + rows):
            picture, extension, caption = samples[row % len(samples)]
            # The pictures recur, and nothing is copied: a new cache knows none. Captions differ.
            for suffix, content in ((extension, picture), ("txt", f"{caption}, {row}".encode())):
                info = tarfile.TarInfo(f"{row:08d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def originals() -> Iterator[tuple[bytes, str, str]]:
    """Picture, extension and caption of every sample that comes with the project."""
    for source in SOURCES:
        with tarfile.open(source) as tar:
            files: dict[str, dict[str, bytes]] = {}
            for info in tar:
                key, _, extension = info.name.partition(".")
                content = tar.extractfile(info)
                assert content is not None
                files.setdefault(key, {})[extension] = content.read()
        for found in files.values():
            extension = next(name for name in found if name not in ("txt", "json"))
            yield found[extension], extension, found["txt"].decode()


@dataclass(frozen=True)
class Alone:
    """The encoders and what they are measured with: preloaded pictures and captions."""

    encoders: Encoders
    pixels: list[NDArray[np.uint8]]
    captions: list[str]

    def encode(self) -> None:
        """All of them once."""
        vae = self.encoders.vae
        running: Started | None = None
        for start in range(0, len(self.pixels), vae.batch_size):
            # One batch is fetched while the next is computed, as in the pipeline.
            started = vae.start(self.pixels[start : start + vae.batch_size])
            if running is not None:
                vae.finish(running)
            running = started
        if running is not None:
            vae.finish(running)
        self.encoders.text.encode(self.captions)

    def seconds(self) -> float:
        """Wall seconds for a picture with its caption."""
        self.encode()  # warms up
        took, began = [], time.perf_counter()
        while time.perf_counter() - began < ALONE_SECONDS:
            start = time.perf_counter()
            self.encode()
            took.append(time.perf_counter() - start)
        return statistics.median(took) / len(self.pixels)


def load_alone(config: EncodeConfig) -> Alone:
    """The encoders of a job, with the first pictures of the project."""
    model = resolve_model(config.model)
    settings = choose_settings(config, None, model)
    device = networks.choose_device(config, None)
    shapes = networks.choose_shapes(config, None, device, settings.framing.resolution)
    vae = networks.choose_vae(config, None, model, shapes.device)
    encoders = networks.load_encoders(model, shapes, vae, 0, device)
    count = max(8 * shapes.vae_batch_size, shapes.text_batch_size)
    few = list(itertools.islice(originals(), count))
    pixels = [prepare(picture, settings.framing)[0].pixels for picture, _, _ in few]
    encoders.vae.calibrate(pixels[: shapes.vae_batch_size])
    return Alone(encoders, pixels, [f"{text}, {n}" for n, (_, _, text) in enumerate(few)])


@contextlib.contextmanager
def networks_left_out(alone: Alone) -> Iterator[None]:
    """Every batch is answered with the same latents and embeddings: all else remains to be done."""
    vae, text = alone.encoders.vae, alone.encoders.text
    images = torch.zeros(vae.batch_size, 3, *alone.pixels[0].shape[:2], device=vae.device)
    with torch.inference_mode():
        latents = vae._parameters(vae.working, images)
        embeds = text._encode_batch([""] * text.batch_size, 0)
    with (
        patch.object(VaeEncoder, "_parameters", lambda *_: latents),
        patch.object(TextEncoder, "_encode_batch", lambda *_: embeds),
    ):
        yield


def timed(job: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds of a job that says nothing."""
    with contextlib.redirect_stdout(io.StringIO()):
        cpu, start = time.process_time(), time.perf_counter()
        job()
        return time.perf_counter() - start, time.process_time() - cpu


def measure(shards: str, model: str, cache: Path, resolution: int | None) -> dict[str, float]:
    """One encode in this process, the encoders alone before and after, and all but them."""
    config = EncodeConfig((shards,), model=model, cache=cache, resolution=resolution, report=False)
    alone = load_alone(config)
    before = alone.seconds()
    wall, _ = timed(lambda: commands.encode(config))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    encoder = (before + alone.seconds()) / 2
    written = json.loads((cache / "manifest.json").read_text())["totals"]["written"]
    with networks_left_out(alone):
        again = replace(config, cache=cache.with_name(f"{cache.name}-again"))
        _, others = timed(lambda: commands.encode(again))
    return {
        "images": written,
        "wall_seconds": wall,
        "images_per_second": written / wall,
        "encoder_images_per_second": 1 / encoder,
        "of_encoder": written / wall * encoder,
        "other_cpu_ms": 1000 * others / written,
        "wall_by_work": wall / (written * encoder + others / cpus.cpus()),
        "peak_mb": peak,
    }


def main() -> None:
    """Run both sizes and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--rows", type=int, default=512, help="of a tar")
    parser.add_argument("--resolution", type=int, help="pixels; the model's own unless given")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        shards, cache = args.child
        print(json.dumps(measure(shards, args.model, Path(cache), args.resolution)))
        return
    cases = {"once": (1, args.rows), "20 tars": (20, args.rows), "a tar of 20": (1, 20 * args.rows)}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (tars, rows) in cases.items():
            sources = Path(folder) / name
            sources.mkdir()
            for number in range(tars):
                write_rows(sources / f"{number:02d}.tar", number * rows, rows)
            found[name] = in_child(args, sources)
            print(name, {key: round(value, 3) for key, value in found[name].items()})
            shutil.rmtree(sources)
    once = found["once"]["peak_mb"]
    growth = {name: row["peak_mb"] / once for name, row in found.items() if name != "once"}
    print("memory, relative to that at once:", {k: round(v, 3) for k, v in growth.items()})
    name = f"prep-{args.resolution}px" if args.resolution else "prep"
    record(name, {"model": args.model, **found, "memory_growth": growth})


def in_child(args: argparse.Namespace, sources: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.prep", "--model", args.model]
    if args.resolution:
        command += ["--resolution", str(args.resolution)]
    command += ["--child", str(sources / "*.tar"), str(sources / "cache")]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=REPO)
    found: dict[str, float] = json.loads(answer.stdout)
    return found


if __name__ == "__main__":
    main()
