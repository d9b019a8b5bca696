"""The random numbers of one training sample, a pure function of (seed, position).

They are drawn on the CPU in the loader's threads, so they depend on neither rank, world size,
batch size nor GPU, and a resumed run draws what the interrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DrawSpec:
    """What to draw from."""

    seed: int
    views: int
    num_ddim_timesteps: int  # solver intervals; with as many as timesteps, index is the timestep
    w_min: float
    w_max: float
    proportion_empty_prompts: float
    latent_noise: bool  # does the cache hold the posterior's logvar?
    noise_offset: float = 0.0
    uniforms: int = 0  # numbers and noises that an objective wants of a sample besides
    noises: int = 0


@dataclass(frozen=True)
class Choice:
    """What is drawn of a sample before it is read."""

    view: int
    caption: int
    drop_caption: bool
    index: int  # solver interval, 0 .. N - 1
    w: float


def generator(spec: DrawSpec, position: int) -> np.random.Generator:
    """Where the draws of a position come from: first `choose`, then `draw_noises`."""
    return np.random.Generator(np.random.Philox(key=[spec.seed, position]))


def answer_generator(spec: DrawSpec, key: str, number: int) -> np.random.Generator:
    """Where the draws of a sample's answer come from, likewise; `key` is the sample's 16 digits."""
    counter = [0, 0, 0, number]  # 2^192 draws apart
    return np.random.Generator(np.random.Philox(key=[spec.seed, int(key, 16)], counter=counter))


def answer_intervals(seed: int, key: str, steps: int) -> list[int]:
    """In which order a sample's answers take the solver's intervals 0 .. steps - 1, each once.

    Where a teacher drew the sample and outputs were kept: answer k is that of the k-th of them.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, int(key, 16)]))
    intervals: list[int] = rng.permutation(steps).tolist()
    return intervals


def choose(spec: DrawSpec, rng: np.random.Generator, num_captions: int) -> Choice:
    """What to read of the sample, and the numbers."""
    return Choice(
        view=int(rng.integers(spec.views)),
        caption=int(rng.integers(num_captions)),
        drop_caption=bool(rng.random() < spec.proportion_empty_prompts),
        index=int(rng.integers(spec.num_ddim_timesteps)),
        w=float(rng.uniform(spec.w_min, spec.w_max)),
    )


def draw_noises(
    spec: DrawSpec, rng: np.random.Generator, into: NDArray[np.float32]
) -> NDArray[np.float32] | None:
    """The diffusion noise into an array `[C, h, w]`; the VAE's is returned where one is needed.

    A noise offset is one normal number per channel, times the offset, added to all of the channel
    (kohya's and diffusers' --noise-offset). It is drawn last, so that all else is the same without.
    """
    rng.standard_normal(out=into, dtype=np.float32)
    latent_noise = rng.standard_normal(into.shape, dtype=np.float32) if spec.latent_noise else None
    if spec.noise_offset:
        shift = rng.standard_normal((into.shape[0], 1, 1), dtype=np.float32)
        into += np.float32(spec.noise_offset) * shift
    return latent_noise


def draw_more(spec: DrawSpec, positions: Sequence[int], arrays: Mapping[str, NDArray[Any]]) -> None:
    """What an objective wants besides: `uniforms` `[B, U]` and `noises` `[B, M, C, h, w]`, fp32.

    Numbers in [0, 1) and standard normal ones, by position from a generator of their own: all else
    is the same without, and beside a teacher's answers, which repeat, these are fresh at every use.
    """
    if not (spec.uniforms or spec.noises):
        return
    for row, position in enumerate(positions):
        counter = [0, 0, 0, 1]  # 2^192 draws after `generator`
        rng = np.random.Generator(np.random.Philox(key=[spec.seed, position], counter=counter))
        if spec.uniforms:
            rng.random(out=arrays["uniforms"][row], dtype=np.float32)
        if spec.noises:
            rng.standard_normal(out=arrays["noises"][row], dtype=np.float32)
