"""Teacher and student of a run side by side, ready to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from shared.cache.conditioning import TextEmbeds
from shared.cache.manifest import Manifest
from shared.machine.device import pick_device, set_threads
from shared.models.family import (
    SCHEDULER_CONFIG,
    Model,
    downscale_of,
    load_config,
    recorded_model,
    resolve_model,
)
from shared.models.fingerprint import fingerprint
from shared.models.vae import load_vae
from shared.networks.cache_checks import check_fit, check_vae
from shared.networks.denoiser import Denoiser
from shared.networks.sampling import draw_latents, teacher_predictor, teacher_scheduler
from shared.storage.urls import Place
from train.config import EvaluateConfig, RunConfig, SampleConfig
from train.export.student import load_student
from train.networks.teacher import load_run_teacher
from train.sampling.samplers import check_eta, student_sampler

Spacings = Mapping[tuple[str, int], str]  # of the teacher's solvers, by sampler and steps


@dataclass(frozen=True)
class Artist:
    """Draws latents with a sampler's name and a number of steps."""

    model: Model
    config: RunConfig  # the run's
    scheduler_config: dict[str, Any]
    student: Denoiser
    vae: AutoencoderKL
    vae_source: str
    device: torch.device
    guidance_scale: float
    eta: float = 0.0  # of the student's scheduler
    teacher: Denoiser | None = None
    empty: TextEmbeds | None = None
    shape: tuple[int, int, int] = (4, 64, 64)  # of the latents
    spacings: Spacings = field(default_factory=dict)

    def with_teacher(self, empty: TextEmbeds) -> Artist:
        """The same with the teacher loaded and its unconditional embedding."""
        teacher = load_run_teacher(self.model.source, self.config).to(self.device)
        return replace(self, teacher=teacher, empty=empty.to(self.device))

    def for_shape(self, shape: tuple[int, int, int]) -> Artist:
        """The same for latents `(C, h, w)`."""
        return replace(self, shape=shape)

    def with_spacings(self, spacings: Spacings) -> Artist:
        """The same with other timestep spacings for the teacher's solvers."""
        return replace(self, spacings=spacings)

    def spacing(self, sampler: str, steps: int) -> str:
        """Return diffusers' `timestep_spacing` of a row; "trailing" unless another was chosen."""
        return self.spacings.get((sampler, steps), "trailing")

    def draw(self, sampler: str, steps: int, texts: TextEmbeds, seeds: Sequence[int]) -> Tensor:
        """Scaled latents `[N, C, h, w]` on the CPU, one per text and seed."""
        texts = texts.to(self.device)
        downscale = downscale_of(self.vae.config)
        size = (self.shape[1] * downscale, self.shape[2] * downscale)
        scale, eta = self.guidance_scale, 0.0
        if sampler == "student":
            eta = self.eta
            predict, scheduler = student_sampler(
                self.student, texts, self.empty, scale, size, self.scheduler_config, self.config
            )
        else:
            assert self.teacher is not None
            assert self.empty is not None
            predict = teacher_predictor(self.teacher, texts, self.empty, scale, size)
            spacing = self.spacing(sampler, steps)
            scheduler = teacher_scheduler(sampler, spacing, self.scheduler_config)
        latents = draw_latents(predict, scheduler, steps, self.shape, seeds, self.device, eta)
        return latents.cpu()

    def check_cache(self, manifest: Manifest, cache: Place) -> None:
        """Raise UserError where a cache was made for another model or by another VAE."""
        check_fit(manifest, self.model, cache)
        check_vae(manifest, self.vae, cache, self.vae_source)

    def teacher_fingerprint(self) -> str:
        """Of the teacher's UNet and the VAE."""
        assert self.teacher is not None
        return fingerprint(self.teacher) + fingerprint(self.vae)


def open_artist(run: Path, flags: EvaluateConfig | SampleConfig) -> Artist:
    """Open a run's exported student, with the VAE that is given, else the run's, else the model's.

    Raises UserError where there is none, and for an --eta that it does not take.
    """
    set_threads(flags.threads)
    device = pick_device(flags.device)
    student, config = load_student(run, device, flags.model)
    check_eta(flags.eta, config)
    model = resolve_model(flags.model or recorded_model(config.model))
    recorded = None if flags.model else config.vae
    vae = flags.vae or (recorded_model(recorded, "--vae") if recorded else model.source)
    scale = flags.guidance_scale
    return Artist(
        model=model,
        config=config,
        scheduler_config=load_config(model.source, SCHEDULER_CONFIG),
        student=student,
        vae=load_vae(vae).to(device),
        vae_source=vae,
        device=device,
        guidance_scale=model.family.guidance_scale if scale is None else scale,
        eta=flags.eta,
    )
