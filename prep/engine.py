"""Runs units of work, one after the other, around one set of encoders."""

from __future__ import annotations

import itertools
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prep.pipeline import Encoders, Settings, decoded, samples
from prep.sources import SourceError, Unit, count_rows
from prep.writer import UnitWriter
from shared.cache import CachePaths, fold, read_unit, read_units, write_manifest
from shared.errors import UserError
from shared.layout import Layout
from shared.progress import Progress
from shared.storage import load_json

COUNTED_TARS = 16
PROBED_ROWS = 256
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow", "pyarrow")


@dataclass(frozen=True)
class Estimate:
    """What is left to do, before it is done."""

    units: int
    rows: int
    bytes: int
    peak_bytes: int
    seconds: float
    free: int

    def __str__(self) -> str:
        hours = f"{self.seconds:.0f} s" if self.seconds < 600 else f"{self.seconds / 3600:.1f} h"
        return (
            f"{self.units} units to encode, about {self.rows} pictures: "
            f"{self.bytes / 1e9:.2f} GB, {hours}; {self.free / 1e9:.1f} GB free"
        )


def pending(cache: CachePaths, units: Sequence[Unit]) -> list[Unit]:
    """The units that are not committed for their present source."""
    return [unit for unit in units if not _done(cache, unit)]


def _done(cache: CachePaths, unit: Unit) -> bool:
    """Is the unit committed for its present source, with all its files in place?"""
    record = read_unit(cache, unit.name)
    if record is None or record.source_state != dict(unit.state):
        return False
    sizes = {cache.root / shard.file: shard.size for shard in record.shards}
    whole = all(path.exists() and path.stat().st_size == size for path, size in sizes.items())
    return whole and (cache.root / record.samples).exists()


def estimate(
    units: Sequence[Unit], layout: Layout, seconds_per_row: float, folder: Path
) -> Estimate:
    """Rows are counted in the first few tars and scaled by size in the others."""
    tars = [unit for unit in units if not unit.members]
    rows = {unit.name: unit.rows_estimate for unit in units}
    for unit in tars[:COUNTED_TARS]:
        rows[unit.name] = count_rows(Path(unit.source))
    counted = sum(rows[unit.name] for unit in tars[:COUNTED_TARS])
    size = sum(unit.state["size"] for unit in tars[:COUNTED_TARS])
    for unit in tars[COUNTED_TARS:]:
        rows[unit.name] = round(counted / size * unit.state["size"])
    total = sum(rows.values())
    # A unit is spooled before it is published, so the largest one is on the disk twice.
    peak = (total + max(rows.values(), default=0)) * layout.stride
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    return Estimate(len(units), total, total * layout.stride, peak, total * seconds_per_row, free)


def refuse_full_disk(work: Estimate, folder: Path) -> None:
    """Raise UserError where the cache would not fit."""
    if work.peak_bytes > work.free:
        raise UserError(
            f"{folder}: the cache needs about {work.peak_bytes / 1e9:.2f} GB while it is written, "
            f"and {work.free / 1e9:.2f} GB are free; free some space or choose another --cache"
        )


def run(
    units: Sequence[Unit],
    encoders: Encoders,
    settings: Settings,
    cache: CachePaths,
    rows: int,
    workers: int,
    max_reject_fraction: float,
) -> None:
    """Encode and commit each unit. A damaged source costs its unit; the others are finished first.

    Raises UserError at the end where sources were damaged, at once where the disk is full or too
    many rows are rejected.
    """
    damaged: list[SourceError] = []
    with Progress("encode", rows, "img") as progress:
        for unit in units:
            writer = UnitWriter(cache, unit, settings, encoders.vae.channels)
            try:
                for sample in samples(unit, encoders, settings, workers):
                    writer.add(sample)
                    progress.update(1, f"{sum(writer.rejected.values())} rejected in this unit")
                writer.commit(max_reject_fraction)
            except SourceError as error:
                damaged.append(error)
                progress.write(f"skipped: {error}")
            finally:
                writer.close()
    if damaged:
        more = f" (and {len(damaged) - 1} more, listed above)" if len(damaged) > 1 else ""
        raise UserError(
            f"{damaged[0]}{more}; the other {len(units) - len(damaged)} units are committed"
        )


def finish(cache: CachePaths) -> str:
    """Fold the units into the manifest; returns a line about the whole cache."""
    units = read_units(cache)
    if not units:
        raise UserError(f"{cache.root} has no committed units; run `prep encode` first")
    versions = {name: version(name) for name in LIBRARIES}
    manifest = fold(load_json(cache.identity), units, versions)
    write_manifest(cache, manifest)
    totals = manifest.totals
    rejected = ", ".join(f"{count} {reason}" for reason, count in totals["rejected"].items())
    return (
        f"{cache.root}: {totals['written']} samples of {totals['read']} rows"
        f"{f' ({rejected})' if rejected else ''}, {totals['bytes'] / 1e6:.1f} MB in "
        f"{len(manifest.shards)} shards; {totals['truncated_captions']} captions were longer "
        "than the encoder reads"
    )


def probe(
    units: Sequence[Unit], settings: Settings, encoders: Encoders
) -> tuple[list[str], NDArray[np.float32], float]:
    """Captions, VAE moments and seconds per picture of the first batch that can be had.

    Raises UserError where no unit holds a usable picture.
    """
    size = encoders.vae.batch_size
    views = settings.framing.views
    square = replace(settings, framing=replace(settings.framing, views=1, buckets=None))
    problem: UserError | None = None
    for unit in units:
        try:
            rows = list(itertools.islice(decoded(unit.rows(), square, 2, size), PROBED_ROWS))
            found = [sample for sample in rows if sample.pictures][:size]
            reasons = Counter(sample.reason for sample in rows if sample.reason)
            why = reasons.most_common(1)[0][0] if reasons else "no rows"
            problem = problem or UserError(
                f"{unit.source}: not one usable picture with a caption in it (mostly: {why})"
            )
        except SourceError as error:  # `run` will report it, if there are others to run
            problem = error
            continue
        if found:
            break
    else:
        assert problem is not None
        raise problem
    pixels = [sample.pictures[0].pixels for sample in found]
    captions = [sample.captions[0] for sample in found]
    moments = encoders.vae.encode(pixels)
    encoders.text.encode(captions)
    start = time.perf_counter()
    encoders.vae.encode(pixels)
    encoders.text.encode(captions)
    return captions, moments, views * (time.perf_counter() - start) / len(found)
