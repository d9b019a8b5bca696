"""Numbers for the report's charts: how the latents are spread, beside a unit normal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prep.cache.random_samples import draw_indices
from shared.cache.identity import VaeIdentity
from shared.cache.paths import CachePaths
from shared.cache.units import Shard

LIMIT = 4.0  # standard deviations shown, each way
BINS = 64
SAMPLES = 256
WIDTH, HEIGHT = 320, 120  # of a chart's plot, in SVG units


@dataclass(frozen=True)
class Histogram:
    """One latent channel after scaling; `area` and `normal` are SVG paths."""

    channel: int
    mean: float
    std: float
    outside: float  # fraction of the values beyond the chart
    area: str
    normal: str


def histograms(
    cache: CachePaths, vae: VaeIdentity, shards: Sequence[Shard], seed: int = 0
) -> list[Histogram]:
    """Draw a histogram per channel over `SAMPLES` random samples, times the scaling factor."""
    channels, scale = vae.channels, vae.scaling_factor
    edges = np.linspace(-LIMIT, LIMIT, BINS + 1)
    counts = np.zeros((channels, BINS))
    total, first, second = 0, np.zeros(channels), np.zeros(channels)
    for shard, index in draw_indices(shards, SAMPLES, seed):
        values = read_mean(cache, shard, index, channels).astype(np.float64) * scale
        total += values.shape[1]
        first += values.sum(1)
        second += (values**2).sum(1)
        counts += [np.histogram(channel, edges)[0] for channel in values]
    if not total:
        return []
    mean = first / total
    std = np.sqrt(np.maximum(second / total - mean**2, 0))
    density = counts / total / (edges[1] - edges[0])
    tops = np.maximum(density.max(1), 1 / math.sqrt(2 * math.pi)) * 1.05
    return [
        Histogram(
            number, float(mean[number]), float(std[number]),
            max(0.0, 1 - float(counts[number].sum()) / total),
            area_path(density[number] / tops[number]), normal_path(tops[number]),
        )
        for number in range(channels)
    ]  # fmt: skip


def read_mean(cache: CachePaths, shard: Shard, index: int, channels: int) -> NDArray[np.float16]:
    """Read the first view's mean `[C, h * w]` of a sample, and nothing else of it."""
    layout = shard.layout
    latents = layout.fields[0]
    height, width = layout.latent_size
    with (cache.root / shard.file).open("rb", buffering=0) as file:
        file.seek(index * layout.stride + layout.offsets[latents.name])
        data = file.read(np.dtype(latents.dtype).itemsize * channels * height * width)
    return np.frombuffer(data, latents.dtype).reshape(channels, height * width)


def area_path(heights: Sequence[float] | NDArray[np.float64]) -> str:
    """Write a closed step curve of bars between 0 and 1 as an SVG path."""
    step = WIDTH / len(heights)
    tops = (f"V{HEIGHT * (1 - y):.1f}H{n * step:.1f}" for n, y in enumerate(heights, 1))
    return f"M0 {HEIGHT}{''.join(tops)}V{HEIGHT}Z"


def normal_path(top: float) -> str:
    """Write the unit normal's density as an SVG path; `top` is the upper edge."""
    points = []
    for x in np.linspace(-LIMIT, LIMIT, 81):
        y = math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) / top
        points.append(f"{(x + LIMIT) / (2 * LIMIT) * WIDTH:.1f} {HEIGHT * (1 - y):.1f}")
    return "M" + "L".join(points)
