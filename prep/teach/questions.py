"""What the teacher is asked of a sample, rebuilt from nothing but the sample and its key.

The trainer draws the same when it reads an answer, so no z_t need be stored. Only where answers
were kept while the teacher drew the sample, z_t is what is stored beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.cache.answers import AnswersIdentity
from shared.cache.conditioning import TextEmbeds
from shared.cache.draws import DrawSpec, answer_generator, answer_intervals, choose, draw_noises
from shared.cache.latents import finish_latents
from shared.cache.layout import Layout
from shared.cache.trajectory import alphas_sigmas, derive_noise
from shared.errors import UserError
from shared.storage.urls import Place

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Sample:
    """A sample as it lies in a shard."""

    key: str
    record: Mapping[str, Any]
    arrays: Arrays


@dataclass(frozen=True)
class Question:
    """One point at which the teacher is asked: z_t is made of it on the device."""

    latents: Tensor  # [C, h, w] fp32: x0
    noise: Tensor  # [C, h, w] fp32
    index: int  # solver interval
    prompt_embeds: Tensor  # [L, D] fp16
    pooled_prompt_embeds: Tensor | None  # [P] fp16
    time_ids: Tensor | None  # [6] int32


@dataclass(frozen=True)
class Asking:
    """How questions are drawn: `spec` of the answers, C channels, the VAE's scaling factor."""

    spec: DrawSpec
    channels: int
    scaling_factor: float

    def question(self, sample: Sample, number: int) -> Question:
        """Draw view, caption, timestep and noises of the sample's answer `number` (0, 1, ...)."""
        arrays = sample.arrays
        rng = answer_generator(self.spec, sample.key, number)
        choice = choose(self.spec, rng, int(sample.record["num_captions"]))
        raw = arrays["latents"][choice.view]
        noise = np.empty((self.channels, *raw.shape[-2:]), np.float32)
        latent_noise = draw_noises(self.spec, rng, noise)
        latents = torch.empty(noise.shape, dtype=torch.float32)
        finish_latents(raw.copy(), latent_noise, self.scaling_factor, latents)

        return question_of(arrays, latents, noise, choice.index, choice.view, choice.caption)


@dataclass(frozen=True)
class Retracing:
    """How a teacher that drew a sample is asked again: at points z_t of the trajectory."""

    identity: AnswersIdentity
    scaling_factor: float

    def question(self, sample: Sample, number: int, z: NDArray[np.float16]) -> Question:
        """Ask at z_t `[C, h, w]`, where the sample's answer `number` was kept."""
        steps = self.identity.num_ddim_timesteps
        index = answer_intervals(self.identity.seed, sample.key, steps)[number]
        latents, noise = torch.empty(z.shape, dtype=torch.float32), np.empty(z.shape, np.float32)
        finish_latents(sample.arrays["latents"][0].copy(), None, self.scaling_factor, latents)
        derive_noise(z, latents.numpy(), alphas_sigmas(self.identity)[index], noise)
        return question_of(sample.arrays, latents, noise, index, view=0, caption=0)


def question_of(
    arrays: Arrays, latents: Tensor, noise: NDArray[np.float32], index: int, view: int, caption: int
) -> Question:
    """Ask with one of a sample's captions, and the micro-conditioning of one of its views."""

    def row(name: str, at: int) -> Tensor | None:
        return torch.from_numpy(arrays[name][at].copy()) if name in arrays else None

    prompt_embeds = row("prompt_embeds", caption)
    assert prompt_embeds is not None
    return Question(
        latents, torch.from_numpy(noise), index, prompt_embeds,
        row("pooled_prompt_embeds", caption), row("time_ids", view),
    )  # fmt: skip


def text_of(questions: Sequence[Question]) -> TextEmbeds:
    """Join the captions' embeddings."""
    pooled = [q.pooled_prompt_embeds for q in questions if q.pooled_prompt_embeds is not None]
    return TextEmbeds(
        torch.stack([q.prompt_embeds for q in questions]), torch.stack(pooled) if pooled else None
    )


def read_samples(path: Place, layout: Layout, count: int) -> Iterator[Sample]:
    """Read a shard from its beginning. Raises UserError, naming the sample, for damage."""
    number = 0
    try:
        with path.open("rb") as file:
            while number < count:
                key, record, arrays = layout.unpack(file.read(layout.stride))
                captions = record.get("num_captions")
                if type(captions) is not int or not 1 <= captions <= layout.captions:
                    raise ValueError("damaged record")
                yield Sample(key, record, arrays)
                number += 1
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `prep verify --repair` tells how to mend it") from None
    except ValueError as error:
        what = f"{path} sample {number}: {error}"
        raise UserError(f"{what}; `prep verify` lists the damage") from None
