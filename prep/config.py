"""The flags of `python -m prep`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EncodeConfig:
    """Encode images and captions into a cache; run it again and it goes on where it stopped."""

    shards: tuple[str, ...]
    """Tars, Parquet files, folders, datasets: paths and URLs (braces and globs, quoted)."""
    model: str
    """sd15, sd21, sdxl, tiny-sd, tiny-xl, a local diffusers folder or a hub id."""
    cache: Path
    """Folder of the cache; made if it does not exist."""
    resolution: int | None = None
    """Pixels of a side; the model's own unless given."""
    center_crop: bool = True
    """Crop the centre of a picture; otherwise its top left corner."""
    latents: str = "auto"
    """mean, posterior (mean and logvar, twice the bytes), or auto: posterior where it matters."""
    max_captions: int = 1
    """Captions kept per picture, where its json lists several."""
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
    image_column: str | None = None
    """Column of a table that holds the pictures; guessed by its name and type unless given."""
    caption_column: str | None = None
    """Column of a table that holds the captions; caption, text, TEXT, prompt unless given."""
    key_column: str | None = None
    """Column of a table that names its rows; the picture's path, id or url unless given."""
    streaming: bool = False
    """Read a dataset of the hub (hf://owner/name) shard by shard, without downloading it first."""
    max_image_bytes: int = 256_000_000
    """Reject a picture whose file is larger, without reading it."""
    where: str | None = None
    """Keep rows of which this holds or is unknown: "similarity > 0.3 and license != 'nc'"."""
    max_pwatermark: float | None = None
    """Reject rows whose pwatermark (LAION's) is above; rows without it are kept."""
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
