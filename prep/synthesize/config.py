"""The flags of `python -m prep synthesize`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prep.config import EngineFlags
from shared.cli.defaults import MODEL
from shared.cli.paths import NameOrPath, PlaceFlag, SourceFlag
from shared.cli.ranges import Count, Fraction, Natural, NotNegative, Precision, Seed


@dataclass(frozen=True)
class SynthesizeFlags:
    """What is drawn, and how."""

    captions: tuple[SourceFlag, ...]
    """Captions: a text file (one a line), jsonl, Parquet, a dataset (hf://owner/name or a folder);
    paths and URLs, braces and globs quoted."""
    model: NameOrPath = MODEL
    """The teacher: sd15, sd21, sdxl, tiny-sd, tiny-xl, a diffusers folder, a hub id or one
    .safetensors file."""
    cache: PlaceFlag | None = None
    """The cache: a folder, or a URL such as s3://bucket/cache; made if it does not exist.
    caches/MODEL unless given."""
    sampler: Literal["dpmsolver++", "ddim"] = "dpmsolver++"
    """The solver; both with diffusers' timestep_spacing trailing."""
    steps: Count = 25
    """Steps of the solver for each sample."""
    guidance_scale: NotNegative | None = None
    """As in diffusers, w + 1; the family's unless given. 1 draws without guidance, in half the
    time."""
    per_caption: Count = 1
    """Samples drawn for each caption, each from noise of its own."""
    seed: Seed = 0
    """A sample's noise is drawn from a hash of this, its caption and its number within the
    caption."""
    answers: Natural = 0
    """Outputs of the solver's own steps that are kept of each sample, as answers of the teacher for
    `train distill`: they cost no forward, but bytes. At most --steps, which must divide the
    timesteps there are (1000, usually)."""
    resolution: Count | None = None
    """Side of the square in pixels; the cache's own, else the model's, unless given."""
    clip_skip: Natural = 0
    """How many last layers of the text encoders to leave out, as in diffusers: 1 is kohya's 2."""
    mixed_precision: Precision | None = None
    """Autocast dtype of the teacher; a started cache keeps its own. bf16 where a GPU has it, fp16
    on an older one, no on a CPU. The solver's own steps are fp32."""
    preview_prompts: tuple[str, ...] = ()
    """Prompts embedded for previews; the first captions unless given."""
    batch_size: Count | None = None
    """Samples drawn at once; a started cache keeps its own. 8 on a CPU; on a GPU 32 of 512 px, 8 of
    1024."""
    text_batch_size: Count | None = None
    """Captions per text-encoder call; a started cache keeps its own. 32."""
    threads: Count | None = None
    """CPU threads of the networks; a cache started on a CPU keeps its own. As many as the process
    may use."""
    caption_column: str | None = None
    """Column of a table, or key of the jsonl, that holds the captions; caption, text, TEXT, prompt
    or the only column of text unless given."""
    caption_encoding: str | None = None
    """Encoding of captions that are not UTF-8: cp1252, cp932, gb18030 ...; a byte order mark at a
    file's beginning wins over it."""
    key_column: str | None = None
    """Column or key that names the rows in `samples/`; the caption itself unless given."""
    dataset_config_name: str | None = None
    """Configuration of datasets of the hub that have several; hf://owner/name:CONFIG:SPLIT too."""
    streaming: bool = False
    """Read a dataset of the hub (hf://owner/name) without downloading it first."""
    folder_units: Count | None = None
    """Units of work of a source, a power of two; about 1,000 samples each unless given."""
    max_reject_fraction: Fraction = 0.5
    """Stop when more than this fraction of a unit's rows is rejected."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    part: str | None = None
    """I/N: only the I-th of N parts of the units (0/N .. N-1/N); `prep finish` after the last."""
    prune: bool = False
    """Drop the cache's units whose source is no longer listed in --captions."""
    holdout: Natural | None = None
    """Hold this many samples out of training, as for `encode`."""
    report: bool = True
    """Write report.html, a page that shows whether the cache is good, at the end."""
    dry_run: bool = False
    """Say what would be drawn, how large and how long, and stop."""


@dataclass(frozen=True)
class SynthesizeConfig(EngineFlags, SynthesizeFlags):  # of groups, the last one comes first
    """Let the teacher draw a cache of captions alone; run it again and it goes on where it stopped.

    Where there are pictures, `encode` is the better command: the teacher draws what it knows.
    """
