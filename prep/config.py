"""The flags of `python -m prep`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from prep.rows.row import MAX_IMAGE_BYTES
from shared.cli.defaults import MODEL
from shared.cli.paths import LocalPath, NameOrPath, PlaceFlag, SourceFlag
from shared.cli.ranges import Count, Fraction, Natural, Numbers


@dataclass(frozen=True)
class EncodeConfig:
    """Encode images and captions into a cache; run it again and it goes on where it stopped."""

    shards: tuple[SourceFlag, ...]
    """Tars, Parquet files, folders, datasets: paths and URLs (braces and globs, quoted)."""
    model: NameOrPath = MODEL
    """sd15, sd21, sdxl, tiny-sd, tiny-xl, a diffusers folder, a hub id or one .safetensors file."""
    cache: PlaceFlag | None = None
    """The cache: a folder, or a URL such as s3://bucket/cache; made if it does not exist.
    caches/MODEL unless given."""
    resolution: Count | None = None
    """Pixels of a side; as the cache was begun, or the model's own, unless given."""
    center_crop: bool = True
    """Crop the centre of a picture; otherwise its top left corner."""
    vae: NameOrPath | None = None
    """Another VAE than the model's own: a VAE's or a model's folder, or a hub id."""
    vae_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """What the VAE computes in; a property of the cache once it is begun. auto: float16 on a GPU
    (its activations scaled so that they fit, see docs/fp16-vae.md), float32 on a CPU."""
    random_crop: bool = False
    """Crop a place drawn from the picture's content instead."""
    random_flip: bool = False
    """Mirror half of the views, drawn likewise."""
    views: Count = 1
    """Crops and flips kept per picture, of which training draws one each time."""
    seed: Natural = 0
    """Of the random crops, flips and orders of tags; another one gives others."""
    buckets: bool = False
    """Keep aspect ratios: crop to the nearest of many sizes, all of about resolution² pixels."""
    bucket_reso_steps: Count | None = None
    """Sides of buckets are multiples of it; 64, less for a resolution below 512."""
    min_bucket_reso: Count | None = None
    """Shortest side of a bucket; half the resolution unless given."""
    max_bucket_reso: Count | None = None
    """Longest side of a bucket; twice the resolution unless given."""
    bucket_no_upscale: bool = False
    """Never enlarge: a picture smaller than its bucket is cropped to multiples of the steps."""
    min_size: Natural = 0
    """Reject a picture whose shorter side has fewer pixels."""
    latents: str = "auto"
    """mean, posterior (mean and logvar, twice the bytes), or auto: posterior where it matters."""
    max_captions: Count = 1
    """Captions kept per picture, where its json lists several or --shuffle-caption makes them."""
    shuffle_caption: bool = False
    """Keep --max-captions orders of a caption's tags, of which training draws one each time."""
    keep_tokens: Natural | None = None
    """So many first tags stay in front when the others are shuffled; none unless given."""
    caption_separator: str | None = None
    """Between the tags that are shuffled; a comma unless given."""
    clip_skip: Natural = 0
    """Layers of the text encoders left out at the end, as in diffusers: 1 where kohya says 2."""
    preview_prompts: tuple[str, ...] = ()
    """Prompts embedded for previews; the first captions of the data unless given."""
    vae_batch_size: Count | None = None
    """Pictures per VAE call; a property of the cache once it is begun. 8 on a CPU; on a GPU 16 of
    512 px, 4 of 1024."""
    text_batch_size: Count | None = None
    """Captions per text-encoder call; likewise. 32."""
    threads: Count | None = None
    """CPU threads of the encoders; likewise, where a CPU computes. As many as the process may
    use: by its affinity, cgroup, Slurm's grant and OMP_NUM_THREADS."""
    decode_workers: Count | None = None
    """Threads that read, decode and resize pictures ahead of the encoder; as many, 8 at most."""
    folder_units: Count | None = None
    """Units of work of a folder, a power of two; about 1,000 pictures each unless given."""
    image_column: str | None = None
    """Column of a table that holds the pictures; guessed by its name and type unless given."""
    caption_column: str | None = None
    """Column of a table, or key of the json, that holds the captions; caption, text, TEXT, prompt
    unless given, and of a tar the txt before them."""
    caption_encoding: str | None = None
    """Of captions in files (NAME.txt, metadata.csv) that are no UTF-8: cp1252, cp932, gb18030 ...;
    a byte order mark at a file's beginning goes before it."""
    key_column: str | None = None
    """Column of a table that names its rows; the picture's path, id or url unless given."""
    dataset_config_name: str | None = None
    """Configuration of datasets of the hub that have several; hf://owner/name:CONFIG:SPLIT too."""
    streaming: bool = False
    """Read a dataset of the hub (hf://owner/name) shard by shard, without downloading it first."""
    max_image_bytes: Count = MAX_IMAGE_BYTES
    """Reject a picture whose file is larger, without reading it; another limit than the former
    one reads all units again, and encodes what it lets in."""
    allow_external_images: bool = False
    """Read pictures that the rows of a table name outside the table's folder, host or bucket."""
    where: str | None = None
    """Keep rows of which this holds or is unknown: "similarity > 0.3 and license != 'nc'"."""
    max_pwatermark: Fraction | None = None
    """Reject rows whose pwatermark (LAION's) is above; rows without it are kept."""
    max_reject_fraction: Fraction = 0.5
    """Stop when more than this share of a unit is rejected."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    engine: Literal["local", "ray"] = "local"
    """local: this process. ray: a worker per GPU, or per --cpus-per-worker, of a Ray cluster."""
    ray_address: str | None = None
    """Address of a running Ray cluster (or `auto`); one is started on this machine otherwise."""
    cpus_per_worker: Count | None = None
    """CPU cores, and so threads, of a Ray worker without a GPU; as many as --threads."""
    part: str | None = None
    """I/N: only the I-th of N shares of the units (0/N .. N-1/N); `prep finish` after the last."""
    prune: bool = False
    """Drop the cache's units whose source is no longer listed in --shards."""
    overwrite: bool = False
    """Replace a cache that was made with other settings by one with these."""
    holdout: Natural | None = None
    """Set so many samples aside, chosen by a hash of their keys: nothing is trained on them, and
    `train evaluate` draws them. They stay the same when the cache grows; 0 for none again."""
    report: bool = True
    """Write report.html, a page that shows whether the cache is good, at the end."""
    dry_run: bool = False
    """Say what would be done, how large and how long, and stop."""


@dataclass(frozen=True)
class OriginalsFlags:
    """The flags of commands that compare a cache's samples with what they were made from."""

    cache: PlaceFlag
    shards: tuple[SourceFlag, ...] = ()
    """Where the originals are, as for encode; otherwise only local files are looked at."""
    model: NameOrPath | None = None
    """Where the encoders are; the cache's own model unless given."""
    vae: NameOrPath | None = None
    """Where the VAE is, if the cache was made with another than the model's."""
    device: str = "auto"


@dataclass(frozen=True)
class FinishConfig(OriginalsFlags):
    """Fold all committed units into the manifest (`encode` does it by itself)."""

    holdout: Natural | None = None
    """Samples to set aside, as for `encode`."""
    report: bool = True
    """Write report.html, too."""


@dataclass(frozen=True)
class EmbedConfig:
    """Add prompts to a cache, for previews and `train sample`."""

    cache: PlaceFlag
    prompts: tuple[str, ...]
    model: NameOrPath | None = None
    """Where the text encoders are; the cache's own model unless given."""
    device: str = "auto"


@dataclass(frozen=True)
class VerifyConfig(OriginalsFlags):
    """Check a cache: records, sizes, hashes, checksums, finite values."""

    reencode: Natural = 0
    """Samples, drawn at random, that are encoded again from their source and compared."""
    repair: bool = False
    """Remove the records of damaged units, so that `prep encode` makes these units again."""
    seed: Natural = 0
    """Draws the samples of --reencode."""


@dataclass(frozen=True)
class DecodeConfig(OriginalsFlags):
    """Draw a contact sheet: originals beside their decoded latents."""

    output: LocalPath = Path("contact-sheet.png")
    count: Count = 12
    """Pictures, drawn at random."""
    seed: Natural = 0


@dataclass(frozen=True)
class StatsConfig:
    """Say what is in a cache: totals, sizes, rejections, sources, statistics."""

    cache: PlaceFlag
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class ReportConfig(OriginalsFlags):
    """Write CACHE/report.html: pictures, charts and what was rejected, on one page."""


@dataclass(frozen=True)
class GcConfig:
    """Remove shards and tables that no record of the cache names."""

    cache: PlaceFlag
    dry_run: bool = False
    """Say what would be removed, and stop."""
    all: bool = False
    """Also what was in use less than a day ago; only while nothing encodes or trains on it."""


@dataclass(frozen=True)
class PackConfig:
    """Make an archive of a cache, compressed with zstd, for shipping."""

    cache: PlaceFlag
    output: LocalPath
    """Folder of the archive; what is already there and right is kept."""
    level: Annotated[int, Numbers(int, 1, 19)] = 3
    """zstd's level, 1 to 19: fp16 tensors hardly get smaller above 3."""
    threads: Count | None = None
    """Threads that compress; as many as the process may use unless given."""


@dataclass(frozen=True)
class UnpackConfig:
    """Restore a cache from an archive, bit for bit."""

    input: LocalPath
    """Folder that `prep pack` wrote."""
    cache: PlaceFlag
    """Folder or URL of the cache; what is already there and right is kept."""
