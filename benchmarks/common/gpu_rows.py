"""What `benchmarks.gpu` measures: a training row, an encoder row, the matmul ceiling."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.memory import peak_bytes
from benchmarks.common.models import model_folder, random_weights, write_cache
from benchmarks.common.online import Online
from benchmarks.common.steps import Cached, compare, flops, open_run, seconds, synchronize
from prep.encoders.text import TextEncoder
from prep.encoders.vae import VaeEncoder
from shared.models.family import load_config, resolve_model
from shared.networks.precision import DTYPES
from train.memory.estimate import estimate

NAMES = {"bf16": "bfloat16", "fp16": "float16"}
WARM_UP = 3
TEXT_BATCH = 32


@dataclass(frozen=True)
class Row:
    """One line of the table; `student` is encode where the encoders are measured."""

    model: str
    student: str
    precision: str
    compile: bool = False

    @property
    def name(self) -> str:
        """For people, and for `--only`."""
        words = [self.model, self.student, self.precision]
        if self.student != "encode":
            words.append("compile" if self.compile else "eager")
        return " ".join(words)


@dataclass(frozen=True)
class Bench:
    """Where and how long everything is measured."""

    device: torch.device
    root: Path  # for configurations, caches and run folders
    resolutions: dict[str, int]
    batch: dict[str, int]  # the largest that is tried
    pairs: int
    block: float  # seconds of steps that are timed together
    matmul: int  # side of the matrices
    threads: int | None = None
    # TFLOP per sample of a cached step, by model and student, once counted.
    work: dict[tuple[str, str], float] = field(default_factory=dict)


def measure(row: Row, bench: Bench, ceiling: float) -> dict[str, Any]:
    """A row at the largest batch that fits: halved until it does. `ceiling` is in TFLOP/s.

    Where not even one sample fits, the answer says so.
    """
    batch, kind = bench.batch[row.model], training
    if row.student == "encode":  # which keeps no activations
        batch, kind = 2 * batch, encoders
    while batch:
        found = unless_out_of_memory(partial(kind, row, bench, batch, ceiling))
        release(bench.device)
        if found is not None:
            return {"batch": batch, **found}
        batch //= 2
    return {"out_of_memory": True}


def unless_out_of_memory(action: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Its answer, or None; the exception, which would hold the tensors, is gone by then."""
    try:
        return action()
    except torch.OutOfMemoryError:
        return None


def release(device: torch.device) -> None:
    """Give back what the row before has left."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)


def reset_peak(device: torch.device) -> None:
    """Forget the most memory there has been."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def training(row: Row, bench: Bench, batch: int, ceiling: float) -> dict[str, Any]:
    """The trainer's own step, and on an eager bf16 row the online baseline's."""
    source = model_folder(row.model, bench.root)
    cache = bench.root / f"{row.model}-cache"
    if not cache.exists():
        write_cache(source, cache, bench.resolutions[row.model], 16 * bench.batch[row.model])
    flags: dict[str, Any] = {"compile": True} if row.compile else {}
    run = open_run(
        source, cache, bench.root / row.name.replace(" ", "-"), bench.device,
        student=row.student, mixed_precision=row.precision, train_batch_size=batch,
        threads=bench.threads, **flags,
    )  # fmt: skip
    reset_peak(bench.device)  # weights are made in fp32; a real run makes them on the CPU
    trainer = Cached(run)
    try:
        found = cached(trainer, bench, batch)
        if not row.compile:  # of which the estimate, which takes seconds, does not know
            found["estimated_gb"] = estimated_bytes(trainer) / 1e9
        kind = row.model, row.student
        if kind not in bench.work and not row.compile:  # the counter does not see compiled code
            bench.work[kind] = flops(trainer.fed) / batch / 1e12
        found |= share_of_matmul(row, bench, found, ceiling)
        if row.precision == "bf16" and not row.compile:
            baseline = partial(online, trainer, bench, row, batch)
            found["online"] = unless_out_of_memory(baseline) or {"out_of_memory": True}
    finally:
        trainer.close()
    return found


def share_of_matmul(
    row: Row, bench: Bench, found: dict[str, Any], ceiling: float
) -> dict[str, float]:
    """Where an eager row of the same model and student has been counted."""
    work = bench.work.get((row.model, row.student))
    if work is None or "samples_per_second" not in found:
        return {}
    return {"tflop_per_sample": work, "of_matmul": work * found["samples_per_second"] / ceiling}


def cached(trainer: Cached, bench: Bench, batch: int) -> dict[str, Any]:
    """Samples per second and peak memory; a step fed by the loader beside one with a batch that
    lies on the device."""
    began = time.perf_counter()
    for _ in range(WARM_UP):
        trainer.fed()
    synchronize(bench.device)
    warm_up = time.perf_counter() - began
    times = block_length(trainer.fed, bench)
    trainer.waited = 0.0
    found = compare(trainer.fed, trainer.with_resident, bench.pairs, bench.device, times)
    return {
        "warm_up_seconds": warm_up,
        "seconds": found["seconds"],
        "samples_per_second": batch / found["seconds"],
        "peak_gb": peak_bytes(bench.device) / 1e9,
        "to_resident": found["ratio"],
        "waited": trainer.waited / (bench.pairs * times * found["seconds"]),
    }


def estimated_bytes(trainer: Cached) -> int:
    """The peak that the trainer foretells before its first step."""
    config, latents = trainer.run.config, trainer.resident.latents
    unet = load_config(config.model, "unet/config.json")
    return estimate(unet, config, (latents.shape[-2], latents.shape[-1])).peak


def online(trainer: Cached, bench: Bench, row: Row, batch: int) -> dict[str, Any]:
    """The baseline with the same student.

    Its VAE computes in the run's precision. SDXL's published one cannot in fp16, and common
    scripts run it in fp32: what that takes is measured beside it.
    """
    resolution = bench.resolutions[row.model]
    baseline = Online(trainer.run, trainer.resident, resolution)
    reset_peak(bench.device)
    total = flops(baseline.step) / batch / 1e12
    times = block_length(baseline.step, bench)
    found = compare(baseline.step, trainer.fed, bench.pairs, bench.device, times)
    answer = {
        "seconds": found["seconds"],
        "samples_per_second": batch / found["seconds"],
        "peak_gb": peak_bytes(bench.device) / 1e9,
        "tflop_per_sample": total,
        "ratio": found["ratio"],
        "ratio_by_flops": total / bench.work[row.model, row.student],
    }
    if baseline.encoders.micro_conditioning:
        del baseline
        torch.backends.cudnn.allow_tf32 = True  # torch's default, which common scripts leave alone
        slow = Online(trainer.run, trainer.resident, resolution, vae_dtype=torch.float32)
        slow.step()
        answer["seconds_with_fp32_vae"] = seconds(slow.step, bench.device, max(times // 2, 1))
    return answer


def block_length(step: Callable[[], object], bench: Bench) -> int:
    """How many steps in a row are timed as one."""
    return max(round(bench.block / seconds(step, bench.device)), 1)


def encoders(row: Row, bench: Bench, batch: int, ceiling: float) -> dict[str, Any]:
    """Stage one's encoders on pictures that lie in memory: images per second."""
    model = resolve_model(str(model_folder(row.model, bench.root)))
    with random_weights(bench.device):
        vae = VaeEncoder(model.source, bench.device, batch, NAMES[row.precision], 1.0)
        text = TextEncoder(model, bench.device, TEXT_BATCH)
    side = bench.resolutions[row.model]
    pixels = list(np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8))
    captions = [f"a picture of {number}" for number in range(TEXT_BATCH)]

    def encode_images() -> None:
        vae.finish(vae.start(pixels))

    def encode_captions() -> None:
        text.encode(captions)

    work = flops(encode_images) / batch / 1e12  # which warms up, too
    encode_captions()
    per_image = seconds(encode_images, bench.device, block_length(encode_images, bench)) / batch
    times = block_length(encode_captions, bench)
    per_caption = seconds(encode_captions, bench.device, times) / TEXT_BATCH
    return {
        "images_per_second": 1 / (per_image + per_caption),
        "vae_images_per_second": 1 / per_image,
        "captions_per_second": 1 / per_caption,
        "peak_gb": peak_bytes(bench.device) / 1e9,
        "vae_tflop_per_image": work,
        "vae_of_matmul": work / per_image / ceiling,
    }


def matmul_tflops(precision: str, bench: Bench) -> float:
    """What the device reaches in one large matrix product, the best of five blocks."""
    side = bench.matmul
    a, b = (torch.randn(side, side, device=bench.device).to(DTYPES[precision]) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)

    product()
    times = block_length(product, bench)
    fastest = min(seconds(product, bench.device, times) for _ in range(5))
    return 2 * side**3 / fastest / 1e12
