"""What every sample of a cache has in common, and the encoders that make it so."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from prep.config import EncodeConfig
from prep.encode.pipeline import Encoders, Settings
from prep.encode.shuffle import Shuffle
from prep.encoders.text import TextEncoder
from prep.encoders.vae import VaeEncoder
from prep.filters.filters import Filters
from prep.images.buckets import choose_buckets
from prep.images.crop import Framing
from shared.cache.identity import (
    ADDED,
    Identity,
    Preprocessing,
    Shapes,
    TextIdentity,
    VaeIdentity,
)
from shared.cache.layout import Layout, cache_layout
from shared.cache.paths import FORMAT
from shared.errors import UsageError, UserError
from shared.machine import cpus
from shared.machine.device import pick_device, set_threads
from shared.models.family import (
    Model,
    native_resolution,
    recorded_model,
    unet_config,
    vae_downscale,
)

SIGNS = ("fingerprint", "fingerprints", *ADDED)  # by which an encoder is known


def choose_device(config: EncodeConfig, stored: Identity | None) -> torch.device:
    """The flag, else the kind that the cache was begun on, else a GPU where there is one.

    `stored` is the cache's identity, here and below; None where there is none. Raises UserError for
    a device that is not here.
    """
    if config.device != "auto" or stored is None:
        return pick_device(config.device)
    kind = stored.shapes.device
    try:
        return pick_device(kind)
    except UserError:
        raise UserError(
            f"{config.cache} was begun on {kind}, which decides its bytes, and there is none "
            "here; go on where there is one, or choose another --cache"
        ) from None


def choose_shapes(
    config: EncodeConfig, stored: Identity | None, device: torch.device, resolution: int
) -> Shapes:
    """The flags, else what the cache was begun with, else defaults."""
    default = Shapes(default_vae_batch_size(device, resolution), 32, device.type)
    begun = stored.shapes if stored else default
    threads = config.threads or begun.threads or config.cpus_per_worker or cpus.threads()
    return Shapes(
        config.vae_batch_size or begun.vae_batch_size,
        config.text_batch_size or begun.text_batch_size,
        device.type,
        threads if device.type == "cpu" else None,
    )


def taken_over(config: EncodeConfig, stored: Identity | None) -> str:
    """A line where the cache was begun on a machine so unlike this one that it is slow here."""
    if not stored:
        return ""
    begun, here = stored.shapes, cpus.threads()
    if begun.device == "cpu" and config.device == "auto" and pick_device("auto").type != "cpu":
        return (
            f"note: {config.cache} was begun on a CPU, which decides its bytes, so the GPU here "
            "is not used; a cache for it is another --cache, or begins with --overwrite --device"
        )
    threads = begun.threads or 0
    if begun.device == "cpu" and config.threads is None and threads > here:
        return (
            f"note: {config.cache} was begun with {threads} threads, which decide its bytes; they "
            f"share {here} here and are slow; for unlike machines begin a cache with "
            f"--threads {here}"
        )
    return ""


def default_vae_batch_size(device: torch.device, resolution: int) -> int:
    """On a GPU 16 pictures of 512 px, or as many larger ones as have so many pixels."""
    if device.type == "cpu":
        return 8
    return min(16, max(1, 16 * 512**2 // resolution**2))


@dataclass(frozen=True)
class VaeChoice:
    """Which VAE encodes, in what, and its stream's scale (None until it is calibrated)."""

    source: str
    dtype: str
    rescale: float | None


def choose_vae(
    config: EncodeConfig, stored: Identity | None, model: Model, device: str
) -> VaeChoice:
    """The flags, else what the cache was begun with, else the model's VAE."""
    source, dtype, rescale = None, "float16" if device == "cuda" else "float32", None
    if stored is not None:
        source, dtype, rescale = stored.vae.source, stored.vae.dtype, stored.vae.rescale
    recorded = recorded_model(source, "--vae") if source and not config.vae else model.source
    if config.vae_dtype not in ("auto", dtype):
        dtype, rescale = config.vae_dtype, None
    return VaeChoice(config.vae or recorded, dtype, rescale)


def load_encoders(
    model: Model, shapes: Shapes, vae: VaeChoice, clip_skip: int, device: torch.device
) -> Encoders:
    """Both encoders on `device`, with the recorded batch shapes and number of threads.

    Raises UserError for a VAE whose latents the model does not take.
    """
    set_threads(shapes.threads)
    torch.backends.cudnn.allow_tf32 = False  # torch's default: 10 bits where fp32 has 23
    encoder = VaeEncoder(vae.source, device, shapes.vae_batch_size, vae.dtype, vae.rescale)
    wanted = unet_config(model.source)["in_channels"]
    if encoder.channels != wanted:
        remedy = "pass a VAE made for this model"
        if vae.source == model.source:
            remedy = "one that also takes a picture or a mask is no teacher: pass its base model"
        raise UserError(
            f"{vae.source}: its VAE's latents have {encoder.channels} channels, the UNet of "
            f"{model.source} takes {wanted}; {remedy}"
        )
    return Encoders(encoder, TextEncoder(model, device, shapes.text_batch_size, clip_skip))


def choose_settings(config: EncodeConfig, stored: Identity | None, model: Model) -> Settings:
    """The flags, else what the cache was begun with, else the model's own.

    Raises UserError for those that do not go together.
    """
    # What is to be replaced may be another model's.
    begun = stored.preprocessing.resolution if stored and not config.overwrite else None
    resolution = config.resolution or begun or native_resolution(model)
    framing = choose_framing(config, resolution, vae_downscale(config.vae or model.source))
    filters = Filters(config.where, config.max_pwatermark)
    keep, shuffle = keep_logvar(config, stored), choose_shuffle(config)
    return Settings(framing, keep, config.max_captions, filters, config.clip_skip, shuffle)


def choose_shuffle(config: EncodeConfig) -> Shuffle | None:
    """How tags are shuffled. Raises UsageError for flags that would do nothing."""
    if not config.shuffle_caption:
        for flag in ("keep_tokens", "caption_separator"):
            if getattr(config, flag) is not None:
                raise UsageError(f"--{flag.replace('_', '-')} needs --shuffle-caption")
        return None
    if config.max_captions == 1:
        raise UsageError(
            "--shuffle-caption: each order of the tags is a caption of the sample; say how many "
            "to keep, such as --max-captions 8"
        )
    separator = "," if config.caption_separator is None else config.caption_separator
    if not separator:
        raise UsageError("--caption-separator is empty; leave it out for a comma")
    return Shuffle(separator, config.keep_tokens or 0, config.seed)


def keep_logvar(config: EncodeConfig, stored: Identity | None) -> bool:
    """Is the posterior's logvar stored? False where that is yet to be measured."""
    if config.latents not in ("auto", "mean", "posterior"):
        raise UserError(f"--latents {config.latents!r} is not one of auto, mean, posterior")
    if config.latents == "auto":
        return stored is not None and stored.posterior
    return config.latents == "posterior"


def choose_framing(config: EncodeConfig, resolution: int, downscale: int) -> Framing:
    """What the flags make of a picture. Raises UserError for a resolution the VAE cannot take."""
    if resolution % downscale or resolution <= 0:
        raise UserError(f"--resolution {resolution} is not a multiple of {downscale}")
    random = config.random_crop or config.random_flip
    if config.views > 1 and not random:
        raise UserError(
            f"--views {config.views}: all would be equal; add --random-crop or --random-flip"
        )
    buckets = None
    table = (config.bucket_reso_steps, config.min_bucket_reso, config.max_bucket_reso)
    if config.buckets:
        buckets = choose_buckets(resolution, *table, config.bucket_no_upscale)
    elif config.bucket_no_upscale or any(value is not None for value in table):
        raise UserError("the flags about bucket sizes need --buckets")
    crop = "center" if config.center_crop else "corner"
    return Framing(
        resolution,
        "random" if config.random_crop else crop,
        config.random_flip,
        config.views,
        config.seed if random else 0,  # which decides nothing otherwise
        config.min_size,
        buckets,
    )


def build_identity(
    model: Model, encoders: Encoders, settings: Settings, shapes: Shapes, generation: int = 0
) -> Identity:
    """The content of identity.json; `generation` counts --overwrite (shared.cache.identity)."""
    vae, own = encoders.vae, encoders.vae.source == model.source
    return Identity(
        FORMAT, model.family.name, model.source, "posterior" if settings.keep_logvar else "mean",
        replace(vae.identity(), source=None if own else vae.source), encoders.text.identity(),
        Preprocessing(
            **settings.framing.to_json(),
            max_captions=settings.max_captions,
            where=settings.filters.where,
            max_pwatermark=settings.filters.max_pwatermark,
            shuffle=settings.shuffle and settings.shuffle.to_json(),
        ),
        shapes, generation,
    )  # fmt: skip


def same_encoder(recorded: VaeIdentity | TextIdentity, here: VaeIdentity | TextIdentity) -> bool:
    """Are these the weights, tokenizers and settings that a cache records, as far as it does?"""
    known = ((getattr(recorded, name, None), name) for name in SIGNS)
    return all(getattr(here, name) == value for value, name in known if value is not None)


def expected_layout(encoders: Encoders, settings: Settings) -> Layout:
    """What samples of these settings will look like; with buckets, those that are square."""
    channels = encoders.vae.channels * (2 if settings.keep_logvar else 1)
    side = settings.framing.resolution // encoders.vae.downscale
    pooled = encoders.text.pooled_width
    return cache_layout(
        (settings.framing.views, channels, side, side),
        (settings.max_captions, encoders.text.length, encoders.text.width),
        None if pooled is None else (settings.max_captions, pooled),
        micro_conditioning=pooled is not None,
    )
