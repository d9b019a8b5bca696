"""Captions to text-encoder states, in batches of a fixed shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging

from prep.reuse import Arrays, Known
from shared.conditioning import TextEmbeds
from shared.errors import UserError
from shared.family import Model
from shared.fingerprint import fingerprint

logging.disable_progress_bar()  # one bar at a time

MEMO_CAPTIONS = 2048  # 0.6 GB of SDXL embeddings
SMALLEST_VOCABULARY = 256  # bytes


class TextEncoder:
    """The one or two CLIP text encoders of a family, in fp32.

    `clip_skip` counts the layers left out as diffusers' pipelines do: in the prompts, not in the
    unconditional embedding.
    """

    def __init__(
        self, model: Model, device: torch.device, batch_size: int, clip_skip: int = 0
    ) -> None:
        self.family, self.device, self.batch_size = model.family, device, batch_size
        self.clip_skip = clip_skip
        self.tokenizers = []
        self.encoders = []
        for part in model.family.text_encoders:
            kind = CLIPTextModelWithProjection if part.endswith("_2") else CLIPTextModel
            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    model.source, subfolder=part.replace("text_encoder", "tokenizer")
                )
                encoder = kind.from_pretrained(
                    model.source, subfolder=part, torch_dtype=torch.float32, use_safetensors=True
                )
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                first = str(error).strip().splitlines()[0]
                raise UserError(f"no {part} can be read from {model.source!r} ({first})") from None
            if len(tokenizer) < SMALLEST_VOCABULARY:  # what transformers makes of missing files
                raise UserError(f"{model.source}: the tokenizer of its {part} has no vocabulary")
            self.tokenizers.append(tokenizer)
            self.encoders.append(encoder.to(device).eval().requires_grad_(False))
        layers = min(int(encoder.config.num_hidden_layers) for encoder in self.encoders)
        most = layers + model.family.hidden_state
        if clip_skip > most:
            raise UserError(f"--clip-skip {clip_skip} is above {most}, all that {model.source} has")

    @property
    def length(self) -> int:
        """L: tokens per caption, padding included."""
        return int(self.tokenizers[0].model_max_length)

    @property
    def width(self) -> int:
        """D: of the joined states."""
        return sum(int(encoder.config.hidden_size) for encoder in self.encoders)

    @property
    def pooled_width(self) -> int | None:
        """P, or None for a family without pooled embeddings."""
        if not self.family.micro_conditioning:
            return None
        return int(self.encoders[-1].config.projection_dim)

    def identity(self) -> dict[str, object]:
        """What the cache records of these encoders."""
        return {
            "fingerprints": [fingerprint(encoder) for encoder in self.encoders],
            "hidden_state": self.family.hidden_state,
            "clip_skip": self.clip_skip,
            "length": self.length,
            "width": self.width,
            "pooled_width": self.pooled_width,
            "dtype": "float32",
        }

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        """Of each caption: has it more tokens than the encoder reads?"""
        ids = self.tokenizers[0](list(captions)).input_ids
        return [len(row) > self.length for row in ids]

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> TextEmbeds:
        """fp16 embeddings of any number of captions, `[N, L, D]` and `[N, P]`."""
        return self._encode(captions, self.clip_skip)

    @torch.inference_mode()
    def _encode(self, captions: Sequence[str], clip_skip: int) -> TextEmbeds:
        parts = []
        for start in range(0, len(captions), self.batch_size):
            chunk = list(captions[start : start + self.batch_size])
            padded = chunk + [""] * (self.batch_size - len(chunk))
            parts.append(self._encode_batch(padded, clip_skip)[: len(chunk)])
        return TextEmbeds.cat(parts)

    def _encode_batch(self, captions: list[str], clip_skip: int) -> TextEmbeds:
        states, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                captions, padding="max_length", max_length=self.length, truncation=True,
                return_tensors="pt",
            ).input_ids.to(self.device)  # fmt: skip
            output = encoder(ids, output_hidden_states=True)
            state = output.hidden_states[self.family.hidden_state - clip_skip]
            states.append(_final_norm(encoder)(state) if self.family.hidden_state == -1 else state)
            pooled = getattr(output, "text_embeds", None)
        return TextEmbeds(
            torch.cat(states, dim=-1).half().cpu(), None if pooled is None else pooled.half().cpu()
        )

    def unconditional(self, force_zeros: bool) -> TextEmbeds:
        """The empty prompt's embedding, or zeros where the model's config says so."""
        empty = self._encode([""], clip_skip=0)
        if not force_zeros:
            return empty
        pooled = empty.pooled_prompt_embeds
        return TextEmbeds(
            torch.zeros_like(empty.prompt_embeds),
            None if pooled is None else torch.zeros_like(pooled),
        )


class CaptionMemo:
    """Encodes equal captions once, as far as `MEMO_CAPTIONS` remember; `encoded` counts them.

    What the cache already has is looked up in `known`, not encoded.
    """

    def __init__(self, encoder: TextEncoder, known: Known) -> None:
        self.encoder, self.known = encoder, known
        self.memory: dict[str, Arrays] = {}
        self.encoded = 0

    def encode(self, captions: Sequence[str]) -> list[Arrays]:
        """Arrays `prompt_embeds` `[L, D]` and `pooled_prompt_embeds` `[P]` for each caption."""
        unmet = [text for text in dict.fromkeys(captions) if text not in self.memory]
        found = {text: arrays for text in unmet if (arrays := self.known.caption(text))}
        fresh = [text for text in unmet if text not in found]
        if fresh:
            self.encoded += len(fresh)
            embeds = self.encoder.encode(fresh)
            found.update({text: _arrays(embeds[i]) for i, text in enumerate(fresh)})
        self.memory.update(found)
        arrays = [self.memory[text] for text in captions]
        while len(self.memory) > MEMO_CAPTIONS:
            del self.memory[next(iter(self.memory))]  # the oldest
        return arrays


def _final_norm(encoder: CLIPTextModel) -> torch.nn.Module:
    """The norm behind the last layer; before transformers 5 it lay one level deeper."""
    norm: torch.nn.Module = getattr(encoder, "text_model", encoder).final_layer_norm
    return norm


def _arrays(embeds: TextEmbeds) -> Arrays:
    arrays = {"prompt_embeds": embeds.prompt_embeds[0].numpy()}
    if embeds.pooled_prompt_embeds is not None:
        arrays["pooled_prompt_embeds"] = embeds.pooled_prompt_embeds[0].numpy()
    return arrays
