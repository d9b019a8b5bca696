"""The flags of `python -m prep`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EncodeConfig:
    """Encode images and captions into a cache; run it again and it goes on where it stopped."""

    shards: tuple[str, ...]
    """WebDataset tars (braces and globs, quoted) or a folder of pictures with metadata.jsonl."""
    model: str
    """sd15, sd21, sdxl, tiny-sd, tiny-xl, a local diffusers folder or a hub id."""
    cache: Path
    """Folder of the cache; made if it does not exist."""
    resolution: int | None = None
    """Pixels of a side; the model's own unless given."""
    center_crop: bool = True
    """Crop the centre of a picture; otherwise its top left corner."""
    random_crop: bool = False
    """Crop a place drawn from the picture's content instead."""
    random_flip: bool = False
    """Mirror half of the views, drawn likewise."""
    views: int = 1
    """Crops and flips kept per picture, of which training draws one each time."""
    seed: int = 0
    """Of the random crops and flips; another one gives others."""
    buckets: bool = False
    """Keep aspect ratios: crop to the nearest of many sizes, all of about resolution² pixels."""
    bucket_reso_steps: int | None = None
    """Sides of buckets are multiples of it; 64, less for a resolution below 512."""
    min_bucket_reso: int | None = None
    """Shortest side of a bucket; half the resolution unless given."""
    max_bucket_reso: int | None = None
    """Longest side of a bucket; twice the resolution unless given."""
    bucket_no_upscale: bool = False
    """Never enlarge: a picture smaller than its bucket is cropped to multiples of the steps."""
    min_size: int = 0
    """Reject a picture whose shorter side has fewer pixels."""
    latents: str = "auto"
    """mean, posterior (mean and logvar, twice the bytes), or auto: posterior where it matters."""
    max_captions: int = 1
    """Captions kept per picture, where its json lists several."""
    clip_skip: int = 0
    """Layers of the text encoders left out at the end, as in diffusers: 1 where kohya says 2."""
    preview_prompts: tuple[str, ...] = ()
    """Prompts embedded for previews; the first captions of the data unless given."""
    vae_batch_size: int | None = None
    """Pictures per VAE call; a property of the cache once it is begun. 8 on a CPU, 16 on a GPU."""
    text_batch_size: int | None = None
    """Captions per text-encoder call; likewise. 32."""
    threads: int | None = None
    """CPU threads of the encoders; likewise. All cores."""
    decode_workers: int = 4
    """Threads that read, decode and resize pictures ahead of the encoder."""
    folder_units: int | None = None
    """Units of work of a folder, a power of two; about 1,000 pictures each unless given."""
    max_reject_fraction: float = 0.5
    """Stop when more than this share of a unit is rejected."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    prune: bool = False
    """Drop the cache's units whose source is no longer listed in --shards."""
    dry_run: bool = False
    """Say what would be done, how large and how long, and stop."""


@dataclass(frozen=True)
class FinishConfig:
    """Fold all committed units into the manifest (`encode` does it by itself)."""

    cache: Path


@dataclass(frozen=True)
class EmbedConfig:
    """Add prompts to a cache, for previews and `train sample`."""

    cache: Path
    prompts: tuple[str, ...]
    model: str | None = None
    """Where the text encoders are; the cache's own model unless given."""
    device: str = "auto"


@dataclass(frozen=True)
class VerifyConfig:
    """Check a cache: records, sizes, hashes, checksums, finite values."""

    cache: Path


@dataclass(frozen=True)
class DecodeConfig:
    """Draw a contact sheet: originals beside their decoded latents."""

    cache: Path
    output: Path = Path("contact-sheet.png")
    count: int = 12
    """Pictures, drawn at random."""
    seed: int = 0
    model: str | None = None
    """Where the VAE is; the cache's own model unless given."""
    device: str = "auto"
