"""The other way to distil, to compare with: everything is computed within the step.

Pixels and token ids go through the VAE and the text encoders in every step; a teacher of its own
beside the student is asked twice, with and without the caption; averages move one parameter at a
time, and the loss is read from the device after every step. So do the scripts in common use. The
loss, the student and the optimizer are the trainer's own, so both ways learn the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.common.models import random_text_encoder, random_unet, random_vae
from shared.cache.conditioning import TextEmbeds
from shared.models.family import resolve_model
from shared.networks.denoiser import call_unet
from shared.networks.precision import DTYPES
from train.data.batch import Batch
from train.networks.full import FullStudent
from train.networks.lora import LoraStudent
from train.trainer.loop import settle
from train.trainer.run import Distillation


@dataclass
class TwoCalls:
    """A student's networks (see `train.objectives.lcd.Networks`) with the teacher held apart."""

    trained: FullStudent | LoraStudent
    teacher_unet: UNet2DConditionModel

    def student(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        return self.trained.student(z, t, batch)

    def target(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        return self.trained.target(z, t, batch)

    @torch.no_grad()
    def teacher(
        self, z: Tensor, t: Tensor, batch: Batch, empty: TextEmbeds
    ) -> tuple[Tensor, Tensor]:
        nothing = empty.expand(len(z))
        return (
            call_unet(self.teacher_unet, z, t, batch.text, batch.time_ids),
            call_unet(self.teacher_unet, z, t, nothing, batch.time_ids),
        )


@dataclass
class OnlineEncoders:
    """What turns resident pixels `[B, 3, H, W]` in [-1, 1] and token ids into a batch."""

    vae: AutoencoderKL
    text_encoders: list[nn.Module]
    hidden_state: int
    micro_conditioning: bool

    @torch.no_grad()
    def encode(self, pixels: Tensor, ids: Tensor, draws: Batch) -> Batch:
        """A batch with the noise, timesteps and guidance of `draws`; ids `[B, L]`."""
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        latents = posterior.sample().float() * self.vae.config.scaling_factor
        states, pooled = [], None
        for encoder in self.text_encoders:
            output = encoder(ids, output_hidden_states=True)
            last = self.hidden_state == -1
            states.append(
                output.last_hidden_state if last else output.hidden_states[self.hidden_state]
            )
            pooled = output.text_embeds if "text_embeds" in output else None
        return Batch(
            latents=latents,
            prompt_embeds=torch.cat(states, dim=-1),
            pooled_prompt_embeds=pooled if self.micro_conditioning else None,
            time_ids=draws.time_ids,
            noise=draws.noise,
            index=draws.index,
            w=draws.w,
        )


def build_encoders(
    source: Path, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype
) -> OnlineEncoders:
    """A model's encoders with random weights."""
    family = resolve_model(str(source)).family
    return OnlineEncoders(
        random_vae(str(source), device, vae_dtype),
        [random_text_encoder(str(source), part, device, dtype) for part in family.text_encoders],
        family.hidden_state,
        family.micro_conditioning,
    )


def build_teacher(run: Distillation) -> UNet2DConditionModel:
    """The teacher beside the student: a full student has one already, a LoRA needs a second."""
    if isinstance(run.student, FullStudent) and run.student.teacher_unet is not None:
        return run.student.teacher_unet
    dtype = DTYPES.get(run.config.mixed_precision or "no", torch.float32)
    return random_unet(run.config.model, run.distributed.device, dtype)


class Online:
    """A run that encodes within its steps. `vae_dtype` is the run's own unless given."""

    def __init__(
        self, run: Distillation, draws: Batch, resolution: int, vae_dtype: torch.dtype | None = None
    ) -> None:
        self.run, self.draws = run, draws
        device, size = run.distributed.device, len(draws.latents)
        dtype = DTYPES.get(run.config.mixed_precision or "no", torch.float32)
        source = Path(run.config.model)
        self.encoders = build_encoders(source, device, dtype, vae_dtype or dtype)
        self.networks = TwoCalls(cast(LoraStudent, run.student), build_teacher(run))
        self.pixels = torch.rand(size, 3, resolution, resolution, device=device) * 2 - 1
        config: Any = self.encoders.text_encoders[0].config
        shape = (size, config.max_position_embeddings)
        self.ids = torch.randint(config.vocab_size, shape, device=device)

    def step(self) -> float:
        """One optimizer step; returns its loss."""
        run = self.run
        batch = self.encoders.encode(self.pixels, self.ids, self.draws)
        with run.autocast():
            loss = run.objective(batch, run.empty, self.networks)
        run.scaler.scale(loss).backward()
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.parameters.values(), run.config.max_grad_norm)
        run.scaler.step(run.optimizer)
        run.optimizer.zero_grad(set_to_none=True)
        settle(run.scaler, run.distributed.device)
        self.move_average()
        return loss.item()

    @torch.no_grad()
    def move_average(self) -> None:
        """A full student's target follows it."""
        student = self.run.student
        if isinstance(student, FullStudent):
            pairs = zip(student.target_unet.parameters(), student.unet.parameters(), strict=True)
            for average, weight in pairs:
                average.lerp_(weight, 1 - student.decay)
