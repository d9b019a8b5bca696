"""What is in a cache, from its manifest, its records and its accounting tables alone.

Records and tables are read one after the other, so a cache of any size takes little memory; tables
are opened only where an example of a rejection is wanted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from prep.cache.accounts import account_batches
from prep.config import StatsConfig
from prep.inspect.answers_stats import answers_line, answers_summary
from shared.cache.identity import Identity, read_identity
from shared.cache.manifest import Manifest, iterate_units, open_manifest
from shared.cache.paths import CachePaths
from shared.cache.sums import ChannelSums
from shared.cache.units import UnitRecord
from shared.errors import UserError
from shared.sanitize import visible
from shared.storage.files import load_record
from shared.storage.typed_json import typed
from shared.wording import counted, duration, percent, rate, size_of

SOURCES_SHOWN = 10


@dataclass
class Bucket:
    """Samples of one latent size."""

    latent_height: int
    latent_width: int
    height: int  # of the pictures, in pixels
    width: int
    samples: int = 0
    shards: int = 0
    bytes: int = 0


@dataclass
class Rejection:
    """Rows that were not written for one reason."""

    reason: str
    count: int = 0
    source: str = ""  # of the example
    example: str = ""  # key in the source


@dataclass
class Source:
    """What came from one source."""

    source: str
    units: int = 0
    read: int = 0
    written: int = 0


@dataclass
class Summary:
    """A cache at a glance."""

    cache: str
    state: str  # complete, or what is missing
    identity: Identity
    versions: Mapping[str, str]
    units: int = 0
    read: int = 0
    written: int = 0
    truncated_captions: int = 0
    shards: int = 0
    bytes: int = 0
    buckets: list[Bucket] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    latents_mean: list[float] = field(default_factory=list)  # per channel, unscaled
    latents_std: list[float] = field(default_factory=list)
    source_count: int = 0
    sources: list[Source] = field(default_factory=list)  # the largest
    notes: dict[str, int] = field(default_factory=dict)
    throughput: Mapping[str, Any] | None = None  # of the last `prep encode`
    answers: Mapping[str, Any] | None = None  # of the teacher, where there are any

    @property
    def rejected_count(self) -> int:
        """Rows that were not written."""
        return self.read - self.written


def stats(config: StatsConfig) -> None:
    """Print the summary of a cache as a table or as JSON."""
    summary = summarize(CachePaths(config.cache))
    whole = {**asdict(summary), "identity": summary.identity.to_json()}
    print(json.dumps(whole, indent=2) if config.json else table(summary))


def summarize(cache: CachePaths) -> Summary:
    """Fold a cache's records. Raises UserError where the folder is no cache."""
    identity = read_identity(cache)
    if identity is None:
        raise UserError(f"{cache.root} is not a cache (no identity.json)")
    finished = cache.manifest.exists()
    manifest = open_manifest(cache.root, check_sizes=False) if finished else None
    summary = Summary(str(cache.root), "", identity, manifest.versions if manifest else {})
    buckets: dict[tuple[int, int], Bucket] = {}
    rejected: dict[str, Rejection] = {}
    sources: dict[str, Source] = {}
    sums: ChannelSums | None = None
    files: list[str] = []
    for unit in iterate_units(cache):
        summary.units += 1
        summary.read += unit.read
        summary.written += unit.written
        summary.truncated_captions += unit.truncated_captions
        source = sources.setdefault(unit.source, Source(unit.source))
        source.units, source.read = source.units + 1, source.read + unit.read
        source.written += unit.written
        files += [shard.file for shard in unit.shards]
        count_shards(unit, buckets, identity.vae.downscale)
        count_rejections(cache, unit, rejected)
        for name, count in unit.notes.items():
            summary.notes[name] = summary.notes.get(name, 0) + count
        if unit.sums is not None:
            sums = unit.sums if sums is None else sums + unit.sums
    if sums is not None:
        summary.latents_mean, summary.latents_std = sums.mean_std()
    summary.state = state_of(manifest, files, identity.command)
    summary.buckets = [bucket for _, bucket in sorted(buckets.items())]
    summary.shards, summary.bytes = len(files), sum(bucket.bytes for bucket in summary.buckets)
    summary.rejected = sorted(rejected.values(), key=lambda r: (-r.count, r.reason))
    summary.source_count = len(sources)
    largest = sorted(sources.values(), key=lambda s: (-s.read, s.source))
    summary.sources = largest[:SOURCES_SHOWN]
    with contextlib.suppress(UserError):  # for people, and safe to delete
        summary.throughput = load_record(cache.root / "throughput.json", throughput_of, "delete it")
    summary.answers = answers_summary(cache, manifest)
    return summary


def throughput_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Read what the last `prep encode` said of its speed. Raises ValueError for anything else."""
    kinds = {"images": int, "seconds": float, "device": str}
    return {name: typed(stored[name], kind, name) for name, kind in kinds.items()}


def state_of(manifest: Manifest | None, files: list[str], command: str) -> str:
    """Is the manifest there, and of these shards?"""
    if manifest is None:
        return f"unfinished: run the same `{command}`"
    if [shard.file for shard in manifest.shards] != files:
        return "manifest.json is older than the units: run `prep finish`"
    return "complete"


def count_shards(unit: UnitRecord, buckets: dict[tuple[int, int], Bucket], downscale: int) -> None:
    """Add a unit's shards to the buckets of their latent sizes."""
    for shard in unit.shards:
        h, w = shard.layout.latent_size
        bucket = buckets.setdefault((h, w), Bucket(h, w, h * downscale, w * downscale))
        bucket.samples += shard.count
        bucket.shards += 1
        bucket.bytes += shard.size


def count_rejections(cache: CachePaths, unit: UnitRecord, rejected: dict[str, Rejection]) -> None:
    """Add a unit's rejections, with an example of each reason that has none yet."""
    for reason, count in unit.rejected.items():
        rejected.setdefault(reason, Rejection(reason)).count += count
    wanted = {reason for reason in unit.rejected if not rejected[reason].source}
    for batch in account_batches(cache.root / unit.samples) if wanted else ():
        if not {"reason", "source_key"} <= set(batch.schema.names):
            return
        found = batch.filter(pc.is_in(batch["reason"], pa.array(sorted(wanted))))
        for row in found.select(["reason", "source_key"]).to_pylist():
            if row["reason"] in wanted:
                wanted.remove(row["reason"])
                rejected[row["reason"]].source = unit.source
                rejected[row["reason"]].example = row["source_key"]
        if not wanted:
            return


def table(s: Summary) -> str:
    """Format the summary for a terminal."""
    lines = [
        f"{s.cache}: {s.state}",
        "",
        f"  samples     {s.written:,} of {counted(s.read, 'row')} "
        f"({s.read - s.written:,} rejected), {counted(s.units, 'unit')}",
        f"  size        {size_of(s.bytes)} in {counted(s.shards, 'shard')}",
        f"  captions    {s.truncated_captions:,} longer than the encoder reads",
    ]
    if s.identity.drawn:
        lines.append(
            f"  made        {s.identity.drawn}, {s.identity.drawn.per_caption} per caption"
        )
    lines += [f"  note        {count:,} {visible(name)}" for name, count in s.notes.items()]
    if s.answers:
        lines.append(f"  answers     {answers_line(s.answers)}")
    if s.throughput:
        lines.append(f"  last run    {speed(s.throughput)}")
    rows: list[tuple[str, ...]] = [
        (f"{b.height}x{b.width}", f"{b.latent_height}x{b.latent_width}", f"{b.samples:,}",
         percent(b.samples, s.written), f"{b.shards:,}", size_of(b.bytes))
        for b in s.buckets
    ]  # fmt: skip
    heads = ("pixels (h x w)", "latents", "samples", "percent", "shards", "bytes")
    lines += columns("buckets", heads, rows)
    scale = s.identity.vae.scaling_factor
    rows = [
        (str(number), f"{mean:.3f}", f"{std:.3f}", f"{mean * scale:.3f}", f"{std * scale:.3f}")
        for number, (mean, std) in enumerate(zip(s.latents_mean, s.latents_std, strict=True))
    ]
    lines += columns("latents", ("channel", "mean", "std", "scaled mean", "scaled std"), rows)
    rows = [
        (visible(r.reason, 60), f"{r.count:,}", visible(r.example, 40), visible(r.source, 60))
        for r in s.rejected
    ]
    lines += columns("rejected", ("reason", "rows", "for example", "of"), rows)
    rows = [
        (visible(one.source, 60), f"{one.units:,}", f"{one.read:,}", f"{one.written:,}")
        for one in s.sources
    ]
    more = s.source_count - len(s.sources)
    title = f"sources ({s.source_count:,}{', the largest' if more else ''})"
    lines += columns(title, ("source", "units", "rows", "samples"), rows)
    lines += ["", "identity", *(f"  {k:<32}  {v}" for k, v in flat(s.identity.to_json()))]
    libraries = " ".join(f"{name} {number}" for name, number in s.versions.items())
    return "\n".join([*lines, "", f"libraries  {libraries or 'not recorded yet'}"])


def columns(title: str, heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table with a title; nothing where it has no rows. Numbers go to the right."""
    if not rows:
        return []
    widths = [max(map(len, cells)) for cells in zip(heads, *rows, strict=True)]
    right = [all(row[i][:1].isdigit() or row[i][:1] in "-<>" for row in rows if row[i])
             for i in range(len(heads))]  # fmt: skip
    lines = ["", title]
    for row in (heads, *rows):
        cells = zip(row, widths, right, strict=True)
        padded = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in cells)
        lines.append("  " + "  ".join(padded).rstrip())
    return lines


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`vae.channels`, `4` for everything in nested mappings."""
    for name, item in sorted(value.items()):
        if isinstance(item, Mapping):
            yield from flat(item, f"{prefix}{name}.")
        elif isinstance(item, list):
            yield f"{prefix}{name}", visible(", ".join(map(str, item)))
        else:
            yield f"{prefix}{name}", visible(str(item))


def speed(throughput: Mapping[str, Any]) -> str:
    """`12 images/s (1,000 in 81 s on cpu)`."""
    images, seconds = throughput["images"], throughput["seconds"]
    if not images:
        return f"no image was new ({duration(seconds)} on {throughput['device']})"
    return (
        f"{rate(images / max(seconds, 1e-9), 'image')} "
        f"({images:,} in {duration(seconds)} on {throughput['device']})"
    )
