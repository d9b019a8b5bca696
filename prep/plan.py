"""What there is to do, how large it will be and how long it may take, before it is done."""

from __future__ import annotations

import itertools
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prep.filters import is_filter
from prep.pipeline import Encoders, Sample, Settings, decoded
from prep.sources import SourceError, Unit, estimate_rows
from shared.cache import CachePaths, UnitRecord
from shared.errors import UserError
from shared.layout import Layout

PROBED_ROWS = 256


@dataclass(frozen=True)
class Estimate:
    """What is left to do, before it is done."""

    units: int
    rows: int
    bytes: int
    peak_bytes: int
    seconds: float | None  # unknown where parts of the cache may be copied
    free: int

    def __str__(self) -> str:
        hours = ""
        if self.seconds is not None:
            seconds = self.seconds
            hours = f", {seconds:.0f} s" if seconds < 600 else f", {seconds / 3600:.1f} h"
        return (
            f"{self.units} units to encode, about {self.rows} pictures: "
            f"{self.bytes / 1e9:.2f} GB{hours}; {self.free / 1e9:.1f} GB free"
        )


def pending(cache: CachePaths, units: Sequence[Unit], records: Sequence[UnitRecord]) -> list[Unit]:
    """The units that are not committed for their present source."""
    by_name = {record.name: record for record in records}
    return [unit for unit in units if not _done(cache, unit, by_name.get(unit.name))]


def _done(cache: CachePaths, unit: Unit, record: UnitRecord | None) -> bool:
    """Is the unit committed for its present source, with all its files in place?"""
    if record is None or record.source_state != dict(unit.state):
        return False
    sizes = {cache.root / shard.file: shard.size for shard in record.shards}
    whole = all(path.exists() and path.stat().st_size == size for path, size in sizes.items())
    return whole and (cache.root / record.samples).exists()


def estimate(
    units: Sequence[Unit], layout: Layout, seconds_per_row: float | None, folder: Path
) -> Estimate:
    """Rows are counted in the first few sources and scaled by size in the others."""
    rows = estimate_rows(units)
    total = sum(rows.values())
    # A unit is spooled before it is published, so the largest one is on the disk twice.
    peak = (total + max(rows.values(), default=0)) * layout.stride
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    seconds = None if seconds_per_row is None else total * seconds_per_row
    return Estimate(len(units), total, total * layout.stride, peak, seconds, free)


def refuse_full_disk(work: Estimate, folder: Path) -> None:
    """Raise UserError where the cache would not fit."""
    if work.peak_bytes > work.free:
        raise UserError(
            f"{folder}: the cache needs about {work.peak_bytes / 1e9:.2f} GB while it is written, "
            f"and {work.free / 1e9:.2f} GB are free; free some space or choose another --cache"
        )


def unfiltered(rows: Iterable[Sample]) -> Iterator[Sample]:
    """Those that the user's filters leave."""
    return (sample for sample in rows if not is_filter(sample.reason))


def probe(
    units: Sequence[Unit], settings: Settings, encoders: Encoders
) -> tuple[list[str], NDArray[np.float32], float]:
    """Captions, VAE moments and seconds per picture of the first batch that can be had.

    The VAE is calibrated on that batch if no cache has recorded a scale for it. Raises UserError
    where no unit holds a usable picture.
    """
    size = encoders.vae.batch_size
    views = settings.framing.views
    square = replace(settings, framing=replace(settings.framing, views=1, buckets=None))
    problem: UserError | None = None
    for unit in units:
        try:
            with closing(decoded(unit.rows(), square, 2, size)) as first:
                rows = list(itertools.islice(unfiltered(first), PROBED_ROWS))
            found = [sample for sample in rows if sample.pictures][:size]
            reasons = Counter(sample.reason for sample in rows if sample.reason)
            why = reasons.most_common(1)[0][0] if reasons else "the filters leave no row"
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
    encoders.vae.calibrate(pixels)
    moments = encoders.vae.encode(pixels)
    encoders.text.encode(captions)
    start = time.perf_counter()
    encoders.vae.encode(pixels)
    encoders.text.encode(captions)
    return captions, moments, views * (time.perf_counter() - start) / len(found)
