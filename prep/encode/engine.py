"""A unit of work, encoded and committed; and all units folded into the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from importlib.metadata import version

from prep.cache import holdout
from prep.cache.accounts import account_batches
from prep.cache.answers_fold import KeptAnswers
from prep.cache.retire import retire
from prep.cache.reuse import NOTHING, Known, known_by_source
from prep.cache.stale import refuse_mixture
from prep.encode.captions import CaptionMemo
from prep.encode.networks import Encoders, VaeChoice, load_encoders
from prep.encode.pipeline import encode_rows
from prep.encode.prefetch import map_ahead
from prep.encode.settings import Settings
from prep.encode.writer import UnitWriter
from prep.engines.job import Outcome, Tick
from prep.rows.unit import Counted
from prep.sources.find import SourceError, Unit
from shared.cache.identity import Shapes, command_of, read_identity
from shared.cache.manifest import Manifest, fold, read_units, write_manifest
from shared.cache.paths import CachePaths
from shared.cache.units import UnitRecord
from shared.errors import UserError
from shared.machine.device import pick_device
from shared.models.family import Model
from shared.wording import counted, size_of

LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow", "pyarrow")
WRITES_AHEAD = 4  # chunks of samples that wait to be written


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know to encode any unit; it can be sent to another machine."""

    cache: CachePaths
    model: Model
    shapes: Shapes
    vae: VaeChoice
    settings: Settings
    decode_workers: int
    max_reject_fraction: float
    records: tuple[UnitRecord, ...]  # of the cache as it was before: what they hold is copied
    generation: int = 0  # of the cache's settings: how often --overwrite replaced them

    @property
    def device(self) -> str:
        """The kind of device that the encoders run on."""
        return self.shapes.device

    def load(self) -> Encoders:
        """The encoders, on a device that is free for them."""
        device = pick_device(self.device)  # Ray shows each worker a GPU of its own
        return load_encoders(self.model, self.shapes, self.vae, self.settings.clip_skip, device)

    def do(self, unit: Unit, networks: Encoders, tick: Tick) -> Outcome:
        """Encode and commit a unit."""
        return encode_unit(self, unit, networks, tick)

    @cached_property
    def known(self) -> dict[str, Known]:
        """What the cache has of each source."""
        return known_by_source(self.cache, self.records)


@dataclass(frozen=True)
class Work:
    """What went through the encoders, and the pictures whose latents were there to be copied."""

    pictures: int = 0
    captions: int = 0
    copied: int = 0

    def __add__(self, other: Work) -> Work:
        return type(self)(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        if not (self.pictures or self.captions or self.copied):
            return "nothing had to be encoded"
        copied = f", {counted(self.copied, 'picture')} copied" if self.copied else ""
        captions = counted(self.captions, "caption")
        return f"{counted(self.pictures, 'picture')} and {captions} encoded{copied}"


def encode_unit(job: Job, unit: Unit, encoders: Encoders, tick: Tick) -> Outcome:
    """Encode and commit a unit; `tick` is told of each row, and how many are rejected so far.

    It shares nothing with other units, and doing it twice gives the same files. Raises UserError
    where the disk is full or too many rows are rejected.
    """
    settings, source, damage = job.settings, Counted(unit.reader), ""
    memo = CaptionMemo(encoders.text, job.known.get(unit.source, NOTHING))
    writer = UnitWriter(job.cache, unit, settings, encoders.vae.channels, job.generation)
    rows = replace(unit, reader=source).rows()
    try:
        with (
            closing(encode_rows(rows, encoders, memo, settings, job.decode_workers)) as samples,
            closing(map_ahead(writer.add, samples, 1, WRITES_AHEAD, "write")) as written,
        ):
            for count in written:
                tick(count, writer.rejected.total())
        writer.commit(job.max_reject_fraction, source.handed)
    except SourceError as error:
        damage = str(error)
    finally:
        writer.close()
    work = Work(writer.encoded, memo.encoded, writer.copied)
    return Outcome(writer.read, work, damage)


def finish(cache: CachePaths) -> str:
    """Fold the units into the manifest; returns a line about the whole cache.

    Raises UserError where they are not one state of the cache, or hold no sample.
    """
    units = read_units(cache)
    while True:
        manifest, answers = write_fold(cache, units)
        # One that another process wrote meanwhile, of more units, may just have been replaced.
        if (now := read_units(cache)) == units:
            break
        units = now
    totals = manifest.totals
    rejected = ", ".join(f"{count} {reason}" for reason, count in totals.rejected.items())
    long = totals.truncated_captions
    retries = sum(unit.notes.get("fp32_retries", 0) for unit in units)
    aside = f"; {counted(manifest.heldout, 'sample')} held out" if manifest.heldout else ""
    done = ("sample", "drawn") if manifest.identity.drawn else ("picture", "encoded")
    again = f"; {counted(retries, done[0])} {done[1]} again in float32" if retries else ""
    return (
        f"{cache.root}: {counted(totals.written, 'sample')} of {counted(totals.read, 'row')}"
        f"{f' ({rejected})' if rejected else ''}, {size_of(totals.bytes)} in "
        f"{counted(len(manifest.shards), 'shard')}; {counted(long, 'caption')} "
        f"{'was' if long == 1 else 'were'} longer than the encoder reads{again}{aside}{answers}"
    )


def write_fold(cache: CachePaths, units: list[UnitRecord]) -> tuple[Manifest, str]:
    """Publish the manifest that these units add up to, if they do (`finish` tells).

    So is that of the answers, if any were kept while they were drawn; with words about those.
    """
    if not units:
        raise UserError(f"{cache.root} has no committed units; run `{command_of(cache)}` first")
    identity = read_identity(cache)
    if identity is None:
        raise UserError(f"{cache.identity} does not exist; restore it, or choose another --cache")
    refuse_mixture(cache, units, identity.generation)
    refuse_nothing(cache, units)
    kept = KeptAnswers.of(cache, units) if identity.drawn and identity.drawn.answers else None
    manifest = fold(identity, units, {name: version(name) for name in LIBRARIES})
    holdout.choose(cache, manifest)
    manifest = holdout.set_aside(cache, manifest)
    if kept is not None:
        kept.announce()
    retire(cache, {shard.file for shard in manifest.shards})
    write_manifest(cache, manifest)
    return manifest, "" if kept is None else f"; {kept.settle()}"


def refuse_nothing(cache: CachePaths, units: Sequence[UnitRecord]) -> None:
    """Raise UserError, with the dominant reason and an example, where no row is written."""
    rejected = sum((Counter(unit.rejected) for unit in units), Counter[str]())
    if any(unit.written for unit in units) or not rejected:
        return
    reason, times = rejected.most_common(1)[0]
    unit = next(unit for unit in units if reason in unit.rejected)
    batches = account_batches(cache.root / unit.samples)
    rows = (row for batch in batches for row in batch.to_pylist())
    example = next((row["source_key"] for row in rows if row["reason"] == reason), None)
    raise UserError(
        f"{cache.root}: {rejected.total()} of {counted(rejected.total(), 'row')} rejected, "
        f"{times} of them for {reason!r} (first: {example!r} of {unit.source}); "
        "mend the sources or let more in"
    )
