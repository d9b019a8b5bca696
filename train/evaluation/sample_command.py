"""`train sample`: prompts to a picture, with the embeddings that lie in a cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shared.cache.conditioning import Conditioning, load_conditioning
from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.errors import UserError
from train.config import RunConfig, SampleConfig
from train.data.bucket import largest_bucket
from train.evaluation.artist import open_artist
from train.evaluation.score import decode_all
from train.export.newest_run import newest_student
from train.objectives import guidance_learned, objective_of
from train.sampling.pictures import write_grid, write_picture
from train.sampling.preview import MAX_PROMPTS
from train.sampling.samplers import most_steps
from train.state.run_config import run_config
from train.state.run_paths import recorded_cache


def with_prompts(config: SampleConfig, run: RunConfig, conditioning: Conditioning) -> SampleConfig:
    """The same with the previews' prompts unless some are given. Raises UserError without any."""
    prompts = config.prompt or run.validation_prompts or conditioning.prompts[:MAX_PROMPTS]
    if not prompts:
        raise UserError("the cache has no prompts; pass --prompt")
    return replace(config, prompt=prompts)


def draw_prompts(config: SampleConfig) -> None:
    """Write one picture, or a grid where there are several. Raises UserError for a new prompt."""
    run = newest_student(config.run)
    refuse_guidance(config, run_config(run))
    artist = open_artist(run, config)
    steps = config.steps or objective_of(artist.config).sampler.usual_steps(artist.config)
    most = most_steps(artist.config, artist.scheduler_config)
    if steps > most:
        raise UserError(f"--steps {steps} must be 1 to {most}, all that the student knows")
    cache = config.cache or recorded_cache(artist.config.cache, "--cache")
    manifest = open_manifest(cache)
    artist.check_cache(manifest, cache)
    bucket = largest_bucket(cache, manifest)
    conditioning = load_conditioning(CachePaths(cache).conditioning, manifest.layouts)
    config = with_prompts(config, artist.config, conditioning)
    texts = conditioning.find(config.prompt, cache)
    shape = (artist.vae.config.latent_channels, *bucket.layout.latent_size)
    empty = conditioning.unconditional.to(artist.device)
    artist = replace(artist, empty=empty, shape=shape)
    rows = []
    for number in range(len(config.prompt)):
        same = texts[[number] * config.num_images]
        seeds = range(config.seed, config.seed + config.num_images)
        latents = artist.draw("student", steps, same, seeds)
        rows.append(list(decode_all(artist, latents)))
    if len(rows) == config.num_images == 1:
        write_picture(config.output, np.asarray(rows[0][0]))
    else:
        titles = [f"seed {config.seed + i}" for i in range(config.num_images)]
        write_grid(config.output, rows, titles, config.prompt)
    print(config.output)


def refuse_guidance(config: SampleConfig, run: RunConfig) -> None:
    """Raise UserError for a --guidance-scale that the student's pictures do not depend on."""
    if config.guidance_scale is not None and guidance_learned(run):
        kind = "a distilled LoRA" if run.student == "lora" else "this distilled UNet"
        raise UserError(
            f"--guidance-scale: {kind} is drawn without guidance, which it has learned "
            "(--w-min, --w-max); leave it out"
        )
