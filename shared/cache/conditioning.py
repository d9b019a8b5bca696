"""`conditioning.safetensors`: what text a cache knows beside its captions.

The unconditional embedding (for guidance and caption dropout) and the embeddings of named prompts
(for previews and `train sample`), since the trainer has no text encoder.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from shared.cache.layout import Layout
from shared.errors import UserError, first_line
from shared.storage.files import publish
from shared.storage.reading import read_if_there
from shared.storage.tensors import tensor_chunks
from shared.storage.typed_json import typed
from shared.storage.urls import Place


@dataclass(frozen=True)
class TextEmbeds:
    """`prompt_embeds` `[N, L, D]` and, for SDXL, `pooled_prompt_embeds` `[N, P]`."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: int | slice | Sequence[int]) -> TextEmbeds:
        chosen = [index] if isinstance(index, int) else index
        return self._each(lambda rows: rows[chosen])

    def expand(self, count: int) -> TextEmbeds:
        """Repeat one row, without a copy: an index would be sent to the GPU, which waits."""
        return self._each(lambda rows: rows.expand(count, *rows.shape[1:]))

    def to(self, device: torch.device) -> TextEmbeds:
        """Return the same on a device."""
        return self._each(lambda rows: rows.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TextEmbeds:
        pooled = self.pooled_prompt_embeds
        return TextEmbeds(change(self.prompt_embeds), None if pooled is None else change(pooled))

    @staticmethod
    def cat(parts: Sequence[TextEmbeds]) -> TextEmbeds:
        """Join along the first axis."""
        pooled = [p.pooled_prompt_embeds for p in parts if p.pooled_prompt_embeds is not None]
        return TextEmbeds(
            torch.cat([part.prompt_embeds for part in parts]), torch.cat(pooled) if pooled else None
        )


@dataclass(frozen=True)
class Conditioning:
    """The unconditional embedding, one row, and a row for each named prompt."""

    unconditional: TextEmbeds
    prompts: tuple[str, ...]
    embeds: TextEmbeds

    def find(self, prompts: Sequence[str], cache: object = "CACHE") -> TextEmbeds:
        """Return the embeddings of these prompts, of those in `cache`.

        Raises UserError, with the command that adds what is missing.
        """
        if missing := [prompt for prompt in prompts if prompt not in self.prompts]:
            raise UserError(
                f"no embedding of {missing[0]!r} in the cache, and the trainer has no text "
                f"encoder; add it with: python -m prep embed --cache {shlex.quote(str(cache))} "
                f"--prompts {shlex.join(missing)}"
            )
        return self.embeds[[self.prompts.index(prompt) for prompt in prompts]]

    def with_prompts(self, prompts: Sequence[str], embeds: TextEmbeds) -> Conditioning:
        """Return the same with more prompts."""
        return Conditioning(
            self.unconditional, self.prompts + tuple(prompts), TextEmbeds.cat([self.embeds, embeds])
        )


def dump_conditioning(conditioning: Conditioning) -> bytes:
    """Return the file's content: fp16 safetensors."""
    tensors = {}
    for name, embeds in (("prompts", conditioning.embeds), ("empty", conditioning.unconditional)):
        tensors[f"{name}.prompt_embeds"] = embeds.prompt_embeds
        if embeds.pooled_prompt_embeds is not None:
            tensors[f"{name}.pooled_prompt_embeds"] = embeds.pooled_prompt_embeds
    content = {name: tensor.half() for name, tensor in tensors.items()}
    return b"".join(tensor_chunks(content, {"prompts": json.dumps(conditioning.prompts)}))


def save_conditioning(conditioning: Conditioning, path: Place, tmp: Path) -> None:
    """Publish it."""
    publish([dump_conditioning(conditioning)], path, tmp)


def load_conditioning(path: Place, layouts: Sequence[Layout] = ()) -> Conditioning:
    """Read it back, fp16. Raises UserError where it is missing, and as `parse_conditioning`."""
    data = read_if_there(path)
    if data is None:
        raise UserError(f"{path} does not exist; run the same `prep encode` to its end")
    return parse_conditioning(data, path, layouts)


def parse_conditioning(data: bytes, path: Place, layouts: Sequence[Layout] = ()) -> Conditioning:
    """Return the same of the file's content.

    Raises UserError, naming it, where it is damaged, or where its embeddings do not have the shape
    of those in the cache's shards, whose `layouts` are given.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        prompts = typed(json.loads(header["__metadata__"]["prompts"]), tuple[str, ...], "prompts")
        empty, embeds = (_embeds(tensors, name) for name in ("empty", "prompts"))
        _check(empty, embeds, len(prompts))
        for layout in layouts:
            _check_fit(empty, layout)
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(
            f"{path} is damaged ({why}); delete it and run `prep encode` again"
        ) from None
    return Conditioning(empty, prompts, embeds)


def _embeds(tensors: Mapping[str, Tensor], name: str) -> TextEmbeds:
    pooled = tensors.get(f"{name}.pooled_prompt_embeds")
    return TextEmbeds(tensors[f"{name}.prompt_embeds"], pooled)


def _check(empty: TextEmbeds, embeds: TextEmbeds, count: int) -> None:
    """Raise ValueError for shapes and types that `save_conditioning` does not write."""
    for name, found, rows in (("empty", empty, 1), ("prompts", embeds, count)):
        parts = ((found.prompt_embeds, 3), (found.pooled_prompt_embeds, 2))
        for tensor, axes in parts:
            if tensor is not None and (
                tensor.ndim != axes or len(tensor) != rows or tensor.dtype != torch.float16
            ):
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{name} are {kind} {list(tensor.shape)} for {rows} rows")
    if _widths(empty) != _widths(embeds):
        raise ValueError(f"empty has widths {_widths(empty)}, prompts {_widths(embeds)}")


def _widths(embeds: TextEmbeds) -> list[tuple[int, ...] | None]:
    parts = (embeds.prompt_embeds, embeds.pooled_prompt_embeds)
    return [None if part is None else tuple(part.shape[1:]) for part in parts]


def _check_fit(embeds: TextEmbeds, layout: Layout) -> None:
    """Raise ValueError where the shards' embeddings have another shape."""
    parts = [layout.field(name) for name in ("prompt_embeds", "pooled_prompt_embeds")]
    wanted = [None if part is None else part.shape[1:] for part in parts]
    if _widths(embeds) != wanted:
        raise ValueError(f"its embeddings are {_widths(embeds)}, those in the shards {wanted}")
