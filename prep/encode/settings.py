"""What of the flags decides a sample's bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from prep.config import EncodeConfig
from prep.encode.caption_shuffle import Shuffle
from prep.filters.filters import Filters
from prep.images.buckets import choose_buckets
from prep.images.crop import Framing
from prep.rows.row import Row
from shared.cache.identity import Identity
from shared.errors import UsageError, UserError
from shared.models.family import Model, native_resolution, vae_downscale


@dataclass(frozen=True)
class Settings:
    """What of the flags decides a sample's bytes."""

    framing: Framing
    keep_logvar: bool
    max_captions: int
    filters: Filters = field(default_factory=Filters)
    clip_skip: int = 0
    shuffle: Shuffle | None = None

    def captions(self, row: Row, image_sha256: str) -> tuple[str, ...]:
        """Give a row's captions, shuffled where the flags say so."""
        if self.shuffle is None:
            return row.captions
        return self.shuffle.captions(row.captions, image_sha256, self.max_captions)


def choose_settings(config: EncodeConfig, stored: Identity | None, model: Model) -> Settings:
    """Take the flags, else what the cache was started with, else the model's own.

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


def check_resolution(resolution: int, downscale: int) -> None:
    """Raise UserError for a resolution that is no whole number of latents."""
    if resolution % downscale or resolution <= 0:
        raise UserError(f"--resolution {resolution} is not a multiple of {downscale}")


def choose_framing(config: EncodeConfig, resolution: int, downscale: int) -> Framing:
    """Choose how pictures are cropped. Raises UserError for a resolution the VAE cannot take."""
    check_resolution(resolution, downscale)
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
    crop = "random" if config.random_crop else "center" if config.center_crop else "corner"
    seed = config.seed if random else 0  # which decides nothing otherwise
    flip, views = config.random_flip, config.views
    return Framing(resolution, crop, flip, views, seed, config.min_size, buckets)
