"""What a step is given, and the memory that it is read into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.cache.conditioning import TextEmbeds
from shared.cache.layout import Layout

READ = ("pooled_prompt_embeds", "prompt_embeds", "time_ids", "answers", "z")  # besides latents


@dataclass(frozen=True)
class Batch:
    """What one step needs, B samples of one latent size."""

    latents: Tensor  # [B, C, h, w] fp32: x0, sampled from the posterior and scaled
    prompt_embeds: Tensor  # [B, L, D] fp16
    pooled_prompt_embeds: Tensor | None  # [B, P] fp16
    time_ids: Tensor | None  # [B, 6] int32
    noise: Tensor  # [B, C, h, w] fp32
    index: Tensor  # [B] int64, solver interval
    w: Tensor  # [B] fp32, guidance
    answers: Tensor | None = None  # [B, 2, C, h, w] fp16: the teacher's, conditional first
    uniforms: Tensor | None = None  # [B, U] fp32 in [0, 1), as many as the loss asks for
    noises: Tensor | None = None  # [B, M, C, h, w] fp32, likewise

    @property
    def text(self) -> TextEmbeds:
        """The captions' embeddings."""
        return TextEmbeds(self.prompt_embeds, self.pooled_prompt_embeds)

    def tensors(self) -> dict[str, Tensor]:
        """By name, those that there are."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """A copy on `device`; on the CPU the batch itself."""
        moved = {n: t.to(device, non_blocking=non_blocking) for n, t in self.tensors().items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class Slot:
    """Memory of a batch of one bucket, and the same memory as NumPy sees it."""

    batch: Batch
    arrays: dict[str, NDArray[Any]]  # the batch's; `raw`: latents as stored, fp16; `z` if stored
    views: dict[str, list[memoryview]]  # what is read: each sample's row of each stored field


def allocate(
    layouts: Sequence[Layout],
    channels: int,
    size: int,
    pinned: bool,
    answers: torch.dtype | None = None,
    trajectory: bool = False,
    uniforms: int = 0,
    noises: int = 0,
) -> list[Slot]:
    """A slot of `size` samples for each layout; all share memory, of which one is used at a time.

    With a dtype for `answers` there is room for one of the teacher's a sample, of a `trajectory`
    for its z_t, too; `uniforms` and `noises` are how many of these a sample has. Pinned memory can
    be copied to a CUDA device while the processor does something else.
    """
    tables = []
    for layout in layouts:
        table = _shapes(layout, channels, size, answers, trajectory)
        latents, _ = table["latents"]
        if uniforms:
            table["uniforms"] = ((size, uniforms), torch.float32)
        if noises:
            table["noises"] = ((size, noises, *latents[1:]), torch.float32)
        tables.append(table)
    memory = {}
    for name, (_, dtype) in tables[0].items():
        largest = max(prod(table[name][0]) for table in tables)
        memory[name] = torch.empty(largest, dtype=dtype, pin_memory=pinned)
    slots = []
    for table in tables:
        parts = {n: memory[n][: prod(shape)].view(shape) for n, (shape, _) in table.items()}
        arrays = {name: part.numpy() for name, part in parts.items()}
        batch = Batch(
            parts["latents"], parts["prompt_embeds"], parts.get("pooled_prompt_embeds"),
            parts.get("time_ids"), parts["noise"], parts["index"], parts["w"],
            parts.get("answers"), parts.get("uniforms"), parts.get("noises"),
        )  # fmt: skip
        stored = {"latents": arrays["raw"]} | {n: arrays[n] for n in READ if n in arrays}
        views = {name: [memoryview(row).cast("B") for row in stored[name]] for name in stored}
        slots.append(Slot(batch, arrays, views))
    return slots


def _shapes(
    layout: Layout, channels: int, size: int, answers: torch.dtype | None, trajectory: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of everything that is read or drawn for a batch."""
    latents = (size, channels, *layout.latent_size)
    shapes = {
        "raw": ((size, *layout.fields[0].shape[1:]), torch.float16),
        "latents": (latents, torch.float32),
        "noise": (latents, torch.float32),
        "index": ((size,), torch.int64),
        "w": ((size,), torch.float32),
    }
    for field in layout.fields[1:]:
        dtype = torch.int32 if field.name == "time_ids" else torch.float16
        shapes[field.name] = ((size, *field.shape[1:]), dtype)
    if answers is not None:
        shapes["answers"] = ((size, 2, *latents[1:]), answers)
        if trajectory:
            shapes["z"] = (latents, answers)
    return shapes
