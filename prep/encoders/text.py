"""Captions to text-encoder states, in batches of a fixed shape."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel
from transformers.utils import logging

from prep.encoders.clip import load_clip
from prep.encoders.tokens import tokenized, tokens_fingerprint
from shared.cache.conditioning import TextEmbeds
from shared.cache.identity import TextIdentity
from shared.errors import UserError
from shared.models.family import Model, force_zeros
from shared.models.fingerprint import fingerprint

logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one bar at a time
# A batch of captions is tokenized sooner than further threads wake up, which others keep busy.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What of an encoder's configuration decides its output and does not show in its weights.
CONFIGURED = ("hidden_act", "layer_norm_eps", "num_attention_heads")


class TextEncoder:
    """The one or two CLIP text encoders of a family, in fp32.

    `clip_skip` counts the layers left out as diffusers' pipelines do: in the prompts, not in the
    unconditional embedding.
    """

    def __init__(
        self, model: Model, device: torch.device, batch_size: int, clip_skip: int = 0
    ) -> None:
        self.family, self.device, self.batch_size = model.family, device, batch_size
        self.clip_skip, self.force_zeros = clip_skip, force_zeros(model)
        self.tokenizers = []
        self.encoders = []
        for part in model.family.text_encoders:
            tokenizer, encoder = load_clip(model, part)
            self.tokenizers.append(tokenizer)
            self.encoders.append(encoder.to(device).eval().requires_grad_(False))  # type: ignore[arg-type]
        layers = min(int(encoder.config.num_hidden_layers) for encoder in self.encoders)
        most = layers + model.family.hidden_state
        if clip_skip > most:
            raise UserError(f"--clip-skip {clip_skip} is above {most}, all that {model.source} has")

    @property
    def length(self) -> int:
        """L: tokens per caption, padding included."""
        # A tokenizer that does not say gives a number with thirty digits.
        most = self.encoders[0].config.max_position_embeddings
        return int(min(self.tokenizers[0].model_max_length, most))

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

    def identity(self) -> TextIdentity:
        """Describe the encoders as a cache records them."""
        parts = self.family.text_encoders
        names = [part.replace("text_encoder", "tokenizer") for part in parts]
        tokens = [tokens_fingerprint(tokenizer, self.length) for tokenizer in self.tokenizers]
        return TextIdentity(
            fingerprints=tuple(map(fingerprint, self.encoders)),
            length=self.length,
            width=self.width,
            force_zeros=self.force_zeros,
            pooled_width=self.pooled_width,
            hidden_state=self.family.hidden_state,
            clip_skip=self.clip_skip,
            configs=dict(zip(parts, map(_configuration, self.encoders), strict=True)),
            tokenizers=dict(zip(names, tokens, strict=True)),
        )

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        """Of each caption: has it more tokens than the encoder reads?"""
        return tokenized(self.tokenizers[0], captions, self.length)[1] if captions else []

    def encode(self, captions: Sequence[str]) -> TextEmbeds:
        """fp16 embeddings of any number of captions, `[N, L, D]` and `[N, P]`."""
        return self._encode(captions, self.clip_skip)[0]

    def encode_and_count(self, captions: Sequence[str]) -> tuple[TextEmbeds, list[bool]]:
        """Do what `encode` and `truncated` do, in one pass."""
        return self._encode(captions, self.clip_skip)

    @torch.inference_mode()
    def _encode(self, captions: Sequence[str], clip_skip: int) -> tuple[TextEmbeds, list[bool]]:
        parts, truncated = [], list[bool]()
        for start in range(0, len(captions), self.batch_size):
            chunk = list(captions[start : start + self.batch_size])
            padded = chunk + [""] * (self.batch_size - len(chunk))
            embeds, longer = self._encode_batch(padded, clip_skip)
            parts.append(embeds[: len(chunk)])
            truncated += longer[: len(chunk)]
        return TextEmbeds.cat(parts), truncated

    def _encode_batch(self, captions: list[str], clip_skip: int) -> tuple[TextEmbeds, list[bool]]:
        states, pooled = [], None
        tokens = [tokenized(tokenizer, captions, self.length) for tokenizer in self.tokenizers]
        for (ids, _), encoder in zip(tokens, self.encoders, strict=True):
            output = encoder(torch.tensor(ids).to(self.device), output_hidden_states=True)
            state = output.hidden_states[self.family.hidden_state - clip_skip]
            states.append(_final_norm(encoder)(state) if self.family.hidden_state == -1 else state)
            pooled = getattr(output, "text_embeds", None)
        embeds = TextEmbeds(
            torch.cat(states, dim=-1).half().cpu(), None if pooled is None else pooled.half().cpu()
        )
        return embeds, tokens[0][1]

    def unconditional(self) -> TextEmbeds:
        """Embed the empty prompt, or give zeros where the model's config says so."""
        empty, _ = self._encode([""], clip_skip=0)
        if not self.force_zeros:
            return empty
        pooled = empty.pooled_prompt_embeds
        return TextEmbeds(
            torch.zeros_like(empty.prompt_embeds),
            None if pooled is None else torch.zeros_like(pooled),
        )


def _configuration(encoder: PreTrainedModel) -> dict[str, object]:
    """Collect what its config.json says that its weights do not show."""
    found = {name: getattr(encoder.config, name) for name in CONFIGURED}
    if isinstance(encoder, CLIPTextModelWithProjection):  # where the pooled state is taken
        found["eos_token_id"] = encoder.config.eos_token_id
    return found


def _final_norm(encoder: CLIPTextModel) -> torch.nn.Module:
    """Find the norm behind the last layer; before transformers 5 it lay one level deeper."""
    norm: torch.nn.Module = getattr(encoder, "text_model", encoder).final_layer_norm
    return norm
