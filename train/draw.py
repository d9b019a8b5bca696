"""`train sample`: prompts to a picture, with the embeddings that lie in a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shared.cache import CachePaths, open_manifest
from shared.conditioning import load_conditioning
from shared.errors import UserError
from shared.vae import decode_latents
from train.artist import open_artist
from train.bucket import open_buckets
from train.config import SampleConfig
from train.pictures import write_grid, write_picture


def draw_prompts(config: SampleConfig) -> None:
    """Write one picture, or a grid where there are several. Raises UserError for a new prompt."""
    artist = open_artist(
        config.run, config.threads, config.device, config.guidance_scale, config.vae
    )
    most = int(artist.config["num_ddim_timesteps"])
    if not 1 <= config.steps <= most:
        raise UserError(f"--steps {config.steps} must be 1 to {most}, the student's solver steps")
    if config.num_images < 1:
        raise UserError("--num-images must be at least 1")
    cache = config.cache or Path(str(artist.config["cache"]))
    manifest = open_manifest(cache)
    artist.check_cache(manifest, cache)
    conditioning = load_conditioning(CachePaths(cache).conditioning)
    texts = conditioning.find(config.prompt)
    bucket = max(open_buckets(cache, manifest), key=len)
    shape = (artist.vae.config.latent_channels, *bucket.layout.latent_size)
    rows = []
    for number in range(len(config.prompt)):
        same = texts[[number] * config.num_images]
        seeds = range(config.seed, config.seed + config.num_images)
        latents = artist.for_shape(shape).draw("student", config.steps, same, seeds)
        rows.append(list(decode_latents(artist.vae, latents / artist.vae.config.scaling_factor)))
    if len(rows) == config.num_images == 1:
        write_picture(config.output, np.asarray(rows[0][0]))
    else:
        titles = [f"seed {config.seed + i}" for i in range(config.num_images)]
        write_grid(config.output, rows, titles, config.prompt)
    print(config.output)
