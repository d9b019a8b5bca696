"""Previews: a grid of fixed prompts at a few numbers of steps while a run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from shared.cache.conditioning import Conditioning, TextEmbeds
from shared.cache.manifest import Manifest
from shared.models.family import SCHEDULER_CONFIG, Model, downscale_of, load_config
from shared.models.vae import decode_latents, load_vae
from shared.networks.cache_checks import check_vae
from shared.networks.denoiser import Denoiser
from shared.networks.sampling import draw_latents
from train.config import RunConfig
from train.objectives import objective_of
from train.sampling.pictures import write_grid
from train.sampling.samplers import most_steps, student_sampler

MAX_PROMPTS = 4


@dataclass(frozen=True)
class Previews:
    """Draws the same prompts from the same noise every time."""

    folder: Path
    prompts: tuple[str, ...]
    texts: TextEmbeds
    empty: TextEmbeds
    vae: AutoencoderKL
    config: RunConfig
    scheduler_config: dict[str, Any]
    shape: tuple[int, int, int]
    guidance_scale: float
    device: torch.device

    @property
    def steps(self) -> list[int]:
        """The objective's numbers of steps, as far as the solver has so many."""
        most = most_steps(self.config, self.scheduler_config)
        wanted = objective_of(self.config).sampler.previewed_steps(self.config)
        return [steps for steps in wanted if steps <= most]

    def draw(self, unet: Denoiser) -> list[NDArray[np.uint8]]:
        """Pictures `[prompts, H, W, 3]` for each number of steps."""
        downscale = downscale_of(self.vae.config)
        size = (self.shape[1] * downscale, self.shape[2] * downscale)
        predict, scheduler = student_sampler(
            unet, self.texts, self.empty, self.guidance_scale, size, self.scheduler_config,
            self.config,
        )  # fmt: skip
        columns = []
        for steps in self.steps:
            seeds = range(len(self.texts))
            with ready_to_draw(unet, self.device):
                latents = draw_latents(predict, scheduler, steps, self.shape, seeds, self.device)
            columns.append(decode_latents(self.vae, latents / self.vae.config.scaling_factor))
        return columns

    def write(
        self, columns: Sequence[NDArray[np.uint8]], step: int
    ) -> tuple[Path, NDArray[np.uint8]]:
        """Put them into `previews/step-N.png`; returns its path and pixels."""
        path = self.folder / f"step-{step:08d}.png"
        rows = [list(row) for row in zip(*columns, strict=True)]
        titles = [f"{steps} step{'s'[: steps > 1]}" for steps in self.steps]
        tmp = self.folder.parent / "tmp"  # swept when the run goes on
        return path, write_grid(path, rows, titles, self.prompts, tmp)


@contextmanager
def ready_to_draw(unet: Denoiser, device: torch.device) -> Iterator[None]:
    """A network in training as it draws: without dropout, in the dtype of its frozen weights."""
    training = unet.training
    unet.eval()
    try:
        with half_autocast(unet, device):
            yield
    finally:
        unet.train(training)


def half_autocast(unet: Denoiser, device: torch.device) -> torch.autocast:
    """Autocast in the dtype of frozen weights that are held in half precision."""
    dtype = unet.conv_in.weight.dtype
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else None, enabled=enabled)


def open_previews(
    config: RunConfig,
    model: Model,
    manifest: Manifest,
    conditioning: Conditioning,
    device: torch.device,
) -> Previews | None:
    """The previews that the flags ask for, or None.

    Raises UserError for a prompt without an embedding, or a cache made by another VAE.
    """
    prompts = config.validation_prompts or conditioning.prompts[:MAX_PROMPTS]
    if not config.validation_steps or not prompts:
        return None
    source = config.vae or model.source
    vae = load_vae(source).to(device)
    check_vae(manifest, vae, config.cache, source)
    layout = max(manifest.shards, key=lambda shard: shard.count).layout
    return Previews(
        folder=config.run / "previews",
        prompts=tuple(prompts),
        texts=conditioning.find(prompts, config.cache).to(device),
        empty=conditioning.unconditional.to(device),
        vae=vae,
        config=config,
        scheduler_config=load_config(model.source, SCHEDULER_CONFIG),
        shape=(manifest.identity.vae.channels, *layout.latent_size),
        guidance_scale=model.family.guidance_scale,
        device=device,
    )
