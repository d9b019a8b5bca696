"""Units that a cache holds and that `--shards` no longer asks for."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from prep.rows.unit import Unit
from shared.cache.identity import command_of
from shared.cache.paths import CachePaths
from shared.cache.units import UnitRecord
from shared.errors import UserError
from shared.storage.files import guard, sync_folder
from shared.wording import counted

DIVISION = re.compile(r"-\d+of(\d+)-[0-9a-f]{8}$")  # NAME-3of8-HASH: the source is cut into 8


@dataclass(frozen=True)
class Stale:
    """Names of units that are to go."""

    gone: list[str]  # of sources that are not listed any more, or made with former settings
    replaced: list[str]  # their source has other units now, which may copy from them


def of_generation(records: Sequence[UnitRecord], generation: int) -> list[UnitRecord]:
    """Those made with the settings of this generation (shared.cache.identity)."""
    return [record for record in records if record.generation == generation]


def find_stale(
    cache: CachePaths,
    records: Sequence[UnitRecord],
    units: Sequence[Unit],
    prune: bool,
    generation: int,
    unlisted_by: str = "that --shards does not",
) -> Stale:
    """Which of the cache's units are not among those that `--shards`, or another flag, names.

    Raises UserError where a source is not listed and may not be dropped: silently kept its units
    would be trained on, silently dropped they would have to be encoded again.
    """
    names, sources = {unit.name for unit in units}, {unit.source for unit in units}
    stale = [record for record in records if record.name not in names]
    former = [record for record in stale if record.generation != generation]
    current = of_generation(stale, generation)
    unlisted = [record for record in current if record.source not in sources]
    if unlisted and not prune:
        raise UserError(
            f"{cache.root} also holds {counted(len(unlisted), 'unit')} {unlisted_by} "
            f"list (first: {unlisted[0].source}); list all, drop what is not listed with --prune, "
            "or give another --cache"
        )
    gone = [record.name for record in former + unlisted]
    return Stale(gone, [record.name for record in stale if record.name not in gone])


def drop(cache: CachePaths, names: Collection[str]) -> None:
    """Remove units' records; their shards are left to `prep gc`."""
    if not names:
        return
    with guard(cache.units):
        for name in names:
            (cache.units / f"{name}.json").unlink(missing_ok=True)  # another part was faster
        sync_folder(cache.units)


def refuse_mixture(cache: CachePaths, records: Sequence[UnitRecord], generation: int) -> None:
    """Raise UserError where these units are not one state of the cache.

    Units of former settings wait to be encoded anew. And where the units of a source are cut in
    two ways, those of the former way wait until the others are complete: together they would
    hold pictures twice.
    """
    remedy = f"run the same `{command_of(cache)}`, with --part every part of it, to its end"
    if former := [record for record in records if record.generation != generation]:
        raise UserError(
            f"{cache.root}: {counted(len(former), 'unit')} still to be encoded with the settings "
            f"that --overwrite brought (first: {former[0].source}); {remedy}"
        )
    divisions: dict[str, str] = {}
    for record in records:
        cut = DIVISION.search(record.name)
        ways = cut[1] if cut else ""
        if divisions.setdefault(record.source, ways) != ways:
            raise UserError(
                f"{cache.root}: {record.source} is being cut into another number of units, and "
                f"not all of these are encoded; {remedy}"
            )
