"""Between two ends, at `a` from 0 (the first) to 1 (the last).

As in DiffMorpher (arXiv 2312.07409): noises spherically, all else in a straight line. LoRAs need no
code here: with the shares 1 - a and a, what they add to each layer's weights, B A, is interpolated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infer.pipelines.inversion import Prompt

PARALLEL = 1e-6  # sine of an angle between noises that are as good as the same


def lerp(first: Tensor, last: Tensor, a: float) -> Tensor:
    """(1 - a) first + a last."""
    return (1 - a) * first + a * last


def slerp(first: Tensor, last: Tensor, a: float) -> Tensor:
    """Go along the great circle: (sin((1 - a) phi) first + sin(a phi) last) / sin(phi).

    phi is the angle between the two (Shoemake, 1985), taken in fp64. Noise keeps its length so,
    where half of each of two independent ones would have 0.7 of it.
    """
    one, other = first.double().flatten(), last.double().flatten()
    cosine = (one @ other / (one.norm() * other.norm())).clamp(-1, 1)
    phi = torch.arccos(cosine)
    sine = torch.sin(phi)
    if sine < PARALLEL:
        return lerp(first, last, a)
    shares = (torch.sin((1 - a) * phi) / sine, torch.sin(a * phi) / sine)
    return (shares[0] * first.double() + shares[1] * last.double()).to(first.dtype)


def between(first: Prompt, last: Prompt, a: float) -> Prompt:
    """Embeddings in between."""
    pooled = None
    if first.pooled is not None and last.pooled is not None:
        pooled = lerp(first.pooled, last.pooled, a)
    return Prompt(lerp(first.embeds, last.embeds, a), pooled)


def adain(latents: Tensor, first: Tensor, last: Tensor, a: float) -> Tensor:
    """Give each channel of `[1, C, h, w]` the mean and deviation that lie between the ends' own.

    x to (x - mean(x)) / std(x) * lerp(std) + lerp(mean), over h and w (DiffMorpher).
    """
    mean = lerp(channel_mean(first), channel_mean(last), a)
    deviation = lerp(channel_deviation(first), channel_deviation(last), a)
    plain = (latents - channel_mean(latents)) / channel_deviation(latents)
    return plain * deviation + mean


def channel_mean(latents: Tensor) -> Tensor:
    """`[1, C, 1, 1]` over h and w."""
    return latents.mean((2, 3), keepdim=True)


def channel_deviation(latents: Tensor) -> Tensor:
    """`[1, C, 1, 1]` over h and w, never 0."""
    return latents.std((2, 3), keepdim=True, correction=0).clamp(min=1e-8)
