"""A LoRA of a smaller rank: of each layer's sum the nearest one, by its singular values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shared.cli.progress import Progress
from shared.networks.styled import Lora, join, scaled


def layers_of(lora: Lora) -> list[str]:
    """The layers that a LoRA adapts."""
    return [name.removesuffix(".lora_A.weight") for name in lora if ".lora_A." in name]


def rank_of(lora: Lora) -> int:
    """The largest rank of its layers."""
    return max(len(lora[f"{layer}.lora_A.weight"]) for layer in layers_of(lora))


def reduced(lora: Lora, rank: int) -> dict[str, Tensor]:
    """The nearest LoRA whose layers have at most this rank, fp32."""
    found = dict(lora)
    layers = layers_of(lora)
    with Progress("reducing", len(layers), "layer") as progress:
        for layer in layers:
            down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
            if len(lora[down]) > rank:
                found[down], found[up] = truncated(lora[down], lora[up], rank)
            progress.update(1)
    return found


def truncated(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best `[rank, ...]` and `[..., rank]` for the product of `[r, ...]` and `[..., r]`.

    With up = Q1 R1 and down' = Q2 R2, the product is Q1 (R1 R2') Q2', and the core between, which
    is r x r, has the product's singular values. Both factors get the root of the values that stay.
    """
    q_up, r_up = torch.linalg.qr(up.flatten(1).double())
    q_down, r_down = torch.linalg.qr(down.flatten(1).double().T)
    u, values, v = torch.linalg.svd(r_up @ r_down.T)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    left = q_up @ u[:, :rank] * root
    right = root[:, None] * (v[:rank] @ q_down.T)
    new_down = right.reshape(rank, *down.shape[1:]).float()
    return new_down, left.reshape(len(up), rank, *up.shape[2:]).float()


def relative_error(wanted: Lora, found: Lora) -> float:
    """|wanted - found| / |wanted| over all that they add: root sums of squares, in float64."""
    whole = square(wanted)
    return math.sqrt(square(join(wanted, scaled(found, -1))) / whole) if whole else 0.0


def square(lora: Lora) -> float:
    """The sum of the squares of all that a LoRA adds: |BA|^2 = trace(B'B AA')."""
    total = 0.0
    for layer in layers_of(lora):
        down = lora[f"{layer}.lora_A.weight"].flatten(1).double()
        up = lora[f"{layer}.lora_B.weight"].flatten(1).double()
        total += float(((up.T @ up) * (down @ down.T)).sum())
    return max(total, 0.0)  # what rounding leaves of nothing may lie below it
