"""The flags of `python -m prep`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from prep.rows.row import MAX_IMAGE_BYTES
from shared.cli.defaults import MODEL
from shared.cli.paths import LocalPath, NameOrPath, PlaceFlag, SourceFlag, StyleFlag, Texts
from shared.cli.ranges import Count, Fraction, Natural, Numbers, Precision, Seed


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """Where units of work are done."""

    engine: Literal["local", "ray"] = "local"
    """local: this process. ray: a worker per GPU, or per --cpus-per-worker, of a Ray cluster."""
    ray_address: str | None = None
    """Address of a running Ray cluster (or `auto`); one is started on this machine otherwise."""
    cpus_per_worker: Count | None = None
    """CPU cores, and so threads, of a Ray worker without a GPU; as many as --threads."""


@dataclass(frozen=True)
class EncodeFlags:
    """What is encoded, and how."""

    shards: tuple[SourceFlag, ...]
    """Tars, Parquet files, folders, datasets: paths and URLs (braces and globs, quoted)."""
    model: NameOrPath = MODEL
    """sd15, sd21, sdxl, tiny-sd, tiny-xl, a diffusers folder, a hub id or one .safetensors file."""
    cache: PlaceFlag | None = None
    """The cache: a folder, or a URL such as s3://bucket/cache; made if it does not exist.
    caches/MODEL unless given."""
    resolution: Count | None = None
    """Side of the square in pixels; the cache's own, else the model's, unless given."""
    center_crop: bool = True
    """Crop the centre of a picture; otherwise its top left corner."""
    vae: NameOrPath | None = None
    """A VAE other than the model's own: a VAE's or a model's folder, or a hub id."""
    vae_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """The VAE's dtype; a started cache keeps its own. auto: float16 on a GPU (with activations
    scaled so that they fit, see docs/fp16-vae.md), float32 on a CPU."""
    random_crop: bool = False
    """Crop at a random position instead, drawn from the picture's content."""
    random_flip: bool = False
    """Mirror half of the views, chosen by the picture's content."""
    views: Count = 1
    """Crops and flips kept per picture; training draws one of them each time."""
    seed: Natural = 0
    """Seed of the random crops, flips and orders of tags."""
    buckets: bool = False
    """Keep aspect ratios: crop to the nearest of many sizes, all of about resolution² pixels."""
    bucket_reso_steps: Count | None = None
    """Sides of buckets are multiples of this: 64, or less for a resolution below 512."""
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
    """Keep --max-captions orders of a caption's tags; training draws one of them each time."""
    keep_tokens: Natural | None = None
    """How many first tags stay in front when the others are shuffled; 0 unless given."""
    caption_separator: str | None = None
    """What stands between the tags that are shuffled; a comma unless given."""
    clip_skip: Natural = 0
    """How many last layers of the text encoders to leave out, as in diffusers: 1 is kohya's 2."""
    preview_prompts: Texts = ()
    """Prompts embedded for previews; the first captions of the data unless given."""
    vae_batch_size: Count | None = None
    """Pictures per VAE call; a started cache keeps its own. 8 on a CPU; on a GPU 16 of 512 px, 4 of
    1024."""
    text_batch_size: Count | None = None
    """Captions per text-encoder call; a started cache keeps its own. 32."""
    threads: Count | None = None
    """CPU threads of the encoders; a cache started on a CPU keeps its own. As many as the process
    may use: by its affinity, cgroup, Slurm's grant and OMP_NUM_THREADS."""
    decode_workers: Count | None = None
    """Threads that decode and resize pictures ahead of the encoder; one per core that the process
    may use, 8 at most."""
    folder_units: Count | None = None
    """Units of work of a folder, a power of two; about 1,000 pictures each unless given."""
    image_column: str | None = None
    """Column of a table that holds the pictures; guessed by its name and type unless given."""
    caption_column: str | None = None
    """Column of a table, or key of the json, that holds the captions; caption, text, TEXT, prompt
    unless given, and of a tar the txt before them."""
    caption_encoding: str | None = None
    """Encoding of captions in files (NAME.txt, metadata.csv) that are not UTF-8: cp1252, cp932,
    gb18030 ...; a byte order mark at a file's beginning wins over it."""
    key_column: str | None = None
    """Column of a table that names its rows; the picture's path, id or url unless given."""
    dataset_config_name: str | None = None
    """Configuration of datasets of the hub that have several; hf://owner/name:CONFIG:SPLIT too."""
    streaming: bool = False
    """Read a dataset of the hub (hf://owner/name) shard by shard, without downloading it first."""
    max_image_bytes: Count = MAX_IMAGE_BYTES
    """Reject a picture whose file is larger, without reading it. A new limit reads all units again
    and encodes what it lets in."""
    allow_external_images: bool = False
    """Read pictures that a table names outside its own folder, host or bucket."""
    where: str | None = None
    """Keep rows for which this is true or unknown: "similarity > 0.3 and license != 'nc'"."""
    max_pwatermark: Fraction | None = None
    """Reject rows whose pwatermark (LAION's) is above this; rows without one are kept."""
    max_reject_fraction: Fraction = 0.5
    """Stop when more than this fraction of a unit's rows is rejected."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    part: str | None = None
    """I/N: only the I-th of N parts of the units (0/N .. N-1/N); `prep finish` after the last."""
    prune: bool = False
    """Drop the cache's units whose source is no longer listed in --shards."""
    overwrite: bool = False
    """Replace a cache that was made with other settings by one with these."""
    holdout: Natural | None = None
    """Hold this many samples out of training, chosen by a hash of their keys; `train evaluate`
    draws them. They stay the same when the cache grows; 0 for none again."""
    report: bool = True
    """Write report.html, a page that shows whether the cache is good, at the end."""
    dry_run: bool = False
    """Say what would be done, how large and how long, and stop."""


@dataclass(frozen=True)
class EncodeConfig(EngineFlags, EncodeFlags):  # of groups, the last one comes first
    """Encode images and captions into a cache; run it again and it goes on where it stopped."""


@dataclass(frozen=True)
class TeachFlags:
    """What the teacher is asked, and how."""

    cache: PlaceFlag | None = None
    """A finished cache: a folder or a URL. caches/MODEL unless given."""
    model: NameOrPath | None = None
    """The teacher: a preset, a diffusers folder, a hub id or a file. The cache's own model unless
    given."""
    teacher_lora: StyleFlag = ()
    """A LoRA that the teacher wears (diffusers' or kohya's file), with a scale, 1 unless given; it
    may be given again. `train distill` has to be given the same."""
    answers: Count = 4
    """Answers of each sample, each at a timestep and noise of its own; those there are stay."""
    num_ddim_timesteps: Count | None = None
    """Timesteps are drawn from so many points of the solver: 50, what `train distill` takes by
    default; as many as the schedule has for all of them. Answers that are begun keep theirs."""
    seed: Seed | None = None
    """Draws timestep, noise, view and caption of each answer; 0."""
    mixed_precision: Precision | None = None
    """In which the teacher computes: bf16 where a GPU has it, fp16 on an older one, no on a CPU."""
    batch_size: Count | None = None
    """Answers at a time; answers that are begun keep theirs. 16 of 512 px, 4 of 1024."""
    threads: Count | None = None
    """CPU threads; answers that were begun on a CPU keep theirs."""
    device: str = "auto"
    part: str | None = None
    """I/N: only the I-th of N parts of the units (0/N .. N-1/N); the last one to end finishes."""
    dry_run: bool = False
    """Say what would be done, how large and how long, and stop."""
    dtype: tyro.conf.Suppress[Literal["<f2", "<f4"]] = "<f2"  # as kept; no flag: fp32 is for tests


@dataclass(frozen=True)
class TeachConfig(EngineFlags, TeachFlags):  # of groups, the last one comes first
    """Ask the teacher once about every sample, for all runs to come; add to what is there."""


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
    """Samples to hold out of training, as for `encode`."""
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
