"""Previews: a grid of fixed prompts at 1, 2, 4 and 8 steps while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray

from shared.cache import Manifest
from shared.conditioning import Conditioning, TextEmbeds
from shared.config import to_dict
from shared.family import Model, load_config
from shared.vae import decode_latents, load_vae
from train.config import DistillConfig
from train.pictures import write_grid
from train.sample import draw_latents, student_predictor, student_scheduler
from train.speed import autocast
from train.teacher import check_vae

STEPS = (1, 2, 4, 8)
MAX_PROMPTS = 4


@dataclass(frozen=True)
class Previews:
    """Draws the same prompts from the same noise every time."""

    folder: Path
    prompts: tuple[str, ...]
    texts: TextEmbeds
    vae: AutoencoderKL
    config: dict[str, Any]
    scheduler_config: dict[str, Any]
    shape: tuple[int, int, int]
    guidance_scale: float
    device: torch.device

    def draw(self, unet: UNet2DConditionModel, step: int) -> tuple[Path, NDArray[np.uint8]]:
        """Write `previews/step-N.png`; returns its path and pixels."""
        downscale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        size = (self.shape[1] * downscale, self.shape[2] * downscale)
        predict = student_predictor(unet, self.texts, self.guidance_scale, size)
        scheduler = student_scheduler(self.scheduler_config, self.config)
        training = unet.training
        unet.eval()
        columns = []
        shown = [steps for steps in STEPS if steps <= self.config["num_ddim_timesteps"]]
        for steps in shown:
            seeds = range(len(self.texts))
            with autocast(self.config["mixed_precision"], self.device):  # not the VAE
                latents = draw_latents(predict, scheduler, steps, self.shape, seeds, self.device)
            columns.append(decode_latents(self.vae, latents / self.vae.config.scaling_factor))
        unet.train(training)
        path = self.folder / f"step-{step:08d}.png"
        rows = [list(row) for row in zip(*columns, strict=True)]
        titles = ["1 step", *[f"{steps} steps" for steps in shown[1:]]]
        return path, write_grid(path, rows, titles, self.prompts)


def open_previews(
    config: DistillConfig,
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
    layout = max(
        zip(manifest.shards, manifest.shard_layouts, strict=True), key=lambda pair: pair[0].count
    )[1]
    return Previews(
        folder=config.run / "previews",
        prompts=tuple(prompts),
        texts=conditioning.find(prompts).to(device),
        vae=vae,
        config=to_dict(config),
        scheduler_config=load_config(model.source, "scheduler/scheduler_config.json"),
        shape=(manifest.identity["vae"]["channels"], *manifest.layouts[layout].latent_size),
        guidance_scale=model.family.guidance_scale,
        device=device,
    )
