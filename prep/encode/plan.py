"""What there is to do, how large it will be and how long it may take, before it is done."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prep.encode.decode_rows import decode_rows
from prep.encode.networks import Encoders
from prep.encode.samples import Decoded
from prep.encode.settings import Settings
from prep.filters.checks import Evidence
from prep.filters.filters import is_filter
from prep.images.decode import HEIF_MISSING, reads_heif
from prep.sources.find import SourceError, Unit, estimate_rows
from shared.cache.paths import CachePaths
from shared.cache.units import UnitRecord
from shared.errors import UserError
from shared.storage.files import file_sizes, free_bytes
from shared.wording import counted, duration, size_of

PROBED_ROWS = 256  # of each unit, in search of a usable one
SEARCHED_ROWS = 1 << 16  # in all, where none of those was usable


@dataclass(frozen=True)
class Plan:
    """What is left to do, before it is done."""

    units: int
    rows: int
    bytes: int
    peak_bytes: int
    seconds: float | None  # unknown where parts of the cache may be copied
    free: int
    verb: str = "encode"
    amount: str = ""  # what the units hold, if more is known than about how many pictures

    def __str__(self) -> str:
        if not self.units:
            return f"nothing to {self.verb}: every unit is there; {size_of(self.free)} free"
        amount = self.amount or f"about {counted(self.rows, 'picture')}"
        long = "" if self.seconds is None else f", {duration(self.seconds)}"
        return (
            f"{counted(self.units, 'unit')} to {self.verb}, {amount}: "
            f"{size_of(self.bytes)}{long}; {size_of(self.free)} free"
        )


def pending(cache: CachePaths, units: Sequence[Unit], known: Sequence[UnitRecord]) -> list[Unit]:
    """Find the units that are not committed for their present source with all files in place.

    So are those with pictures that could not be read for want of a package that is there by now.
    `known` are the records that count, of the present settings.
    """
    records = {record.name: record for record in known}
    sizes = {f"shards/{name}": size for name, size in file_sizes(cache.shards).items()}
    tables = {f"samples/{name}" for name in file_sizes(cache.samples)}

    def done(unit: Unit) -> bool:
        record = records.get(unit.name)
        return (
            record is not None
            and not (HEIF_MISSING in record.rejected and reads_heif())
            and record.source_state == dict(unit.state)
            and all(sizes.get(shard.file) == shard.size for shard in record.shards)
            and record.samples in tables
        )

    return [unit for unit in units if not done(unit)]


def make_plan(
    units: Sequence[Unit], stride: int, seconds_per_row: float | None, cache: CachePaths
) -> Plan:
    """Forecast rows, bytes and seconds: rows are counted in a few sources, else told from sizes.

    `stride` are the bytes of a row's sample.
    """
    rows = estimate_rows(units)
    total, largest = sum(rows.values()), max(rows.values(), default=0)
    # A unit is spooled before it is published: the largest one is on the disk twice. What is
    # uploaded does not stay there.
    local = isinstance(cache.root, Path)
    peak = (total + largest if local else 2 * largest) * stride
    seconds = None if seconds_per_row is None else total * seconds_per_row
    free = free_bytes(cache.disk)
    return Plan(len(units), total, total * stride, peak, seconds, free)


def probe(
    units: Sequence[Unit], settings: Settings, encoders: Encoders
) -> tuple[list[str], NDArray[np.float32], float]:
    """Captions, VAE moments and seconds per picture of the first batch that can be had.

    The VAE is calibrated on that batch if no cache has recorded a scale for it. Raises UserError
    where no unit holds a usable picture.
    """
    found = usable(units, settings, encoders.vae.batch_size)
    pixels = [sample.pictures[0].pixels for sample in found]
    captions = [sample.row.captions[0] for sample in found]
    encoders.vae.calibrate(pixels)
    moments = encoders.vae.encode(pixels)
    encoders.text.encode(captions)
    start = time.perf_counter()
    encoders.vae.encode(pixels)
    encoders.text.encode(captions)
    views = settings.framing.views
    return captions, moments, views * (time.perf_counter() - start) / len(found)


def usable(units: Sequence[Unit], settings: Settings, count: int) -> list[Decoded]:
    """Up to `count` samples with pictures, from the first unit in which some are found.

    Every unit's beginning is looked at before any is read further, and then `SEARCHED_ROWS` more
    rows at most. Raises UserError where there are none: for damage to a source if there is any,
    else with the reason that most rows have. And where the filters decide nothing.
    """
    square = replace(settings, framing=replace(settings.framing, views=1, buckets=None))
    search = Search(square, count)
    for unit in units:
        if found := search.look(unit, PROBED_ROWS):
            search.evidence.insist(units)
            return found
    left = SEARCHED_ROWS
    for unit in tuple(search.unread):
        before = search.reasons.total()
        if found := search.look(unit, left):
            search.evidence.insist(units)
            return found
        left -= search.reasons.total() - before
        if left <= 0:
            break
    raise search.failure(units)


class Search:
    """What was seen while looking for usable rows."""

    def __init__(self, settings: Settings, count: int) -> None:
        self.settings, self.count = settings, count
        self.evidence = Evidence(settings.filters)
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # the first row of each reason
        self.damage: SourceError | None = None
        self.unread: list[Unit] = []  # units that go on after what was looked at

    def look(self, unit: Unit, limit: int) -> list[Decoded]:
        """Usable samples among the unit's first `limit` rows that the filters leave."""
        found: list[Decoded] = []
        seen = 0
        noted = self.evidence.noting(unit.rows())
        try:
            with closing(decode_rows(noted, self.settings, 2, self.count)) as rows:
                for sample in rows:
                    if sample.pictures:
                        found.append(sample)
                    else:
                        self._note(unit, sample)
                    seen += not is_filter(sample.reason)
                    if len(found) == self.count:
                        break
                    if seen == limit:
                        self.unread.append(unit)
                        break
        except SourceError as error:  # `run` will report it, if there are others to run
            self.damage = error
            return []
        return found

    def _note(self, unit: Unit, sample: Decoded) -> None:
        self.reasons[sample.reason] += 1
        self.examples.setdefault(sample.reason, f"{sample.row.key!r} of {unit.source}")

    def failure(self, units: Sequence[Unit]) -> UserError:
        """Why nothing was found."""
        if self.damage is not None:
            return self.damage
        more = f" and {counted(len(units) - 1, 'more unit')}" if len(units) > 1 else ""
        unusable = Counter({r: n for r, n in self.reasons.items() if not is_filter(r)})
        reasons = unusable or self.reasons
        why = "they have no rows"
        if reasons:
            reason = reasons.most_common(1)[0][0]
            why = f"mostly: {reason}, such as {self.examples[reason]}"
        return UserError(
            f"{units[0].source}{more}: not one usable picture with a caption in it ({why})"
        )
