"""Stage one: does the encoder wait, and does memory grow with the data?

`python -m benchmarks.prep` encodes one tar of the project's pictures and one of 20 times as many
rows, each in a process of its own, and prints

- busy: CPU seconds (encoding and everything else, OpenMP's waiting included) by wall seconds times
  cores. 1 is a machine that never waits.
- wall_by_work: wall seconds by those of the encoder alone plus all other CPU seconds divided by the
  cores. On a CPU, where decoding shares the cores with it, at most 1.05 is wanted.
- encoder: the encoder's own rate on preloaded pictures, in one process with the pipeline's. On a
  GPU the pipeline should reach 0.95 of it; on a CPU decoding shares the cores with it.
- memory: peak resident memory at 20 times the data, relative to that at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks._machine import record

REPO = Path(__file__).resolve().parent.parent
SOURCES = sorted((REPO / "data" / "pictures" / "train").glob("*.tar"))
TIMES = 20


def write_rows(path: Path, rows: int) -> None:
    """A tar of `rows` samples, the project's pictures over and over under new names."""
    samples = list(originals())
    with tarfile.open(path, "w") as tar:
        for row in range(rows):
            picture, extension, caption = samples[row % len(samples)]
            # The pictures recur, and nothing is copied: a new cache knows none. Captions differ.
            for suffix, content in ((extension, picture), ("txt", f"{caption}, {row}".encode())):
                info = tarfile.TarInfo(f"{row:08d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def originals():
    """Picture, extension and caption of every sample that comes with the project."""
    for source in SOURCES:
        with tarfile.open(source) as tar:
            files: dict[str, dict[str, bytes]] = {}
            for info in tar:
                key, _, extension = info.name.partition(".")
                files.setdefault(key, {})[extension] = tar.extractfile(info).read()
        for found in files.values():
            extension = next(name for name in found if name not in ("txt", "json"))
            yield found[extension], extension, found["txt"].decode()


def measure(tar: Path, model: str, cache: Path, resolution: int | None) -> dict[str, float]:
    """One encode in this process, and the encoders alone on its first pictures."""
    from prep import commands, identity
    from prep.config import EncodeConfig
    from prep.images import prepare
    from shared.family import resolve_model

    config = EncodeConfig(
        (str(tar),), model=model, cache=cache, resolution=resolution, report=False
    )
    resolved = resolve_model(model)
    shapes = identity.choose_shapes(config, commands.CachePaths(cache))
    settings = identity.choose_settings(config, resolved, keep_logvar=False)
    vae = identity.choose_vae(config, commands.CachePaths(cache), resolved, shapes.device)
    encoders = identity.load_encoders(resolved, shapes, vae, 0)
    few = [sample for _, sample in zip(range(8 * shapes.vae_batch_size), originals(), strict=False)]
    pixels = [prepare(picture, settings.framing)[0].pixels for picture, _, _ in few]
    encoders.vae.calibrate(pixels[: shapes.vae_batch_size])

    def encode_all() -> None:
        running = None  # one batch is fetched while the next is computed, as in the pipeline
        for start in range(0, len(pixels), shapes.vae_batch_size):
            begun = encoders.vae.start(pixels[start : start + shapes.vae_batch_size])
            if running is not None:
                encoders.vae.finish(running)
            running = begun
        encoders.vae.finish(running)
        encoders.text.encode([f"{caption}, {n}" for n, (_, _, caption) in enumerate(few)])

    encode_all()  # warms up
    cpu, start = time.process_time(), time.perf_counter()
    encode_all()
    seconds, cpu_alone = time.perf_counter() - start, time.process_time() - cpu
    with contextlib.redirect_stdout(io.StringIO()):
        cpu, start = time.process_time(), time.perf_counter()
        commands.encode(config)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    cores = os.cpu_count() or 1
    written = json.loads((cache / "manifest.json").read_text())["totals"]["written"]
    encoding, spent = (one * written / len(few) for one in (seconds, cpu_alone))
    return {
        "images": written,
        "wall_seconds": wall,
        "images_per_second": written / wall,
        "encoder_images_per_second": len(few) / seconds,
        "of_encoder": written / wall / (len(few) / seconds),
        "encoder_busy": cpu_alone / (seconds * cores),
        "busy": cpu / (wall * cores),
        "wall_by_work": wall / (encoding + (cpu - spent) / cores),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Run both sizes and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--resolution", type=int, help="pixels; the model's own unless given")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        tar, cache = args.child
        print(json.dumps(measure(tar, args.model, cache, args.resolution)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("once", args.rows), (f"{TIMES} times", TIMES * args.rows)):
            tar, cache = Path(folder) / f"{rows}.tar", Path(folder) / f"cache-{rows}"
            write_rows(tar, rows)
            command = [sys.executable, "-m", "benchmarks.prep", "--model", args.model]
            if args.resolution:
                command += ["--resolution", str(args.resolution)]
            answer = subprocess.run(
                [*command, "--child", tar, cache], check=True, stdout=subprocess.PIPE, cwd=REPO
            )
            found[name] = json.loads(answer.stdout)
            print(name, {key: round(value, 3) for key, value in found[name].items()})
    growth = found[f"{TIMES} times"]["peak_mb"] / found["once"]["peak_mb"]
    print(f"memory at {TIMES} times the data: {growth:.3f} of that at once")
    name = f"prep-{args.resolution}px" if args.resolution else "prep"
    record(name, {"model": args.model, **found, "memory_growth": growth})


if __name__ == "__main__":
    main()
