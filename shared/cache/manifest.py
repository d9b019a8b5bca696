"""The cache on disk (format 1): identity, unit records, manifest. See docs/cache-format.md.

`identity.json` is created first and says what every sample in the cache has in common. A unit of
work commits by replacing its record in `units/`; until then nothing it wrote counts. The manifest
is folded from the records and is all that the trainer opens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from typing import Any, Protocol
from unicodedata import normalize

from shared.cache.identity import Identity, command_of
from shared.cache.layout import Layout
from shared.cache.paths import FORMAT, CachePaths, refuse_format
from shared.cache.units import Shard, UnitRecord
from shared.errors import UserError
from shared.storage.files import dump_json, file_sizes, parse_record, publish, read_all
from shared.storage.reading import read_if_there
from shared.storage.typed_json import not_negative, record_of, typed
from shared.storage.urls import Place


@dataclass(frozen=True)
class Totals:
    """What the units add up to."""

    written: int  # samples
    read: int = 0  # rows
    rejected: Mapping[str, int] = field(default_factory=dict)  # reason -> rows
    units: int = 0
    bytes: int = 0  # of all shards
    truncated_captions: int = 0


@dataclass(frozen=True)
class Manifest:
    """The whole cache at a glance."""

    identity: Identity
    layouts: tuple[Layout, ...]  # of the shards, each once
    shards: tuple[Shard, ...]
    totals: Totals
    statistics: Mapping[str, Sequence[float]]  # of the latents, per channel
    versions: Mapping[str, str]
    holdout: str = ""  # a hash over the keys of the samples that are held out, if there are any

    @property
    def heldout(self) -> int:
        """Samples that are never trained on."""
        return sum(len(shard.heldout) for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return it as stored in manifest.json."""
        numbers = {layout: number for number, layout in enumerate(self.layouts)}
        rows = [{**shard.to_json(), "layout": numbers[shard.layout]} for shard in self.shards]
        for row, shard in zip(rows, self.shards, strict=True):
            if shard.heldout:  # which versions that do not know it refuse
                row["heldout"] = list(shard.heldout)
        return {
            "format": FORMAT,
            "identity": self.identity.to_json(),
            "layouts": [layout.to_json() for layout in self.layouts],
            "shards": rows,
            "totals": asdict(self.totals),
            "statistics": dict(self.statistics),
            "versions": dict(self.versions),
            **({"holdout": self.holdout} if self.holdout else {}),
        }


def commit_unit(cache: CachePaths, record: UnitRecord) -> None:
    """Make a unit's work count: its record replaces the former one, atomically."""
    publish([dump_json(record.to_json())], cache.units / f"{record.name}.json", cache.tmp)


def read_unit(cache: CachePaths, name: str) -> UnitRecord | None:
    """Return a unit's record, None where none is committed. Raises UserError for damage."""
    path = cache.units / f"{name}.json"
    content = read_if_there(path)
    return None if content is None else parse_unit(content, path)


def read_units(cache: CachePaths) -> list[UnitRecord]:
    """Return all records, in the order of their names."""
    return list(iterate_units(cache))


def iterate_units(cache: CachePaths) -> Iterator[UnitRecord]:
    """Yield all records, few in memory at a time. Raises UserError as `parse_unit`."""
    paths = unit_files(cache)
    for path, content in zip(paths, read_all(paths), strict=True):
        if content is not None:  # else dropped since the folder was listed
            yield parse_unit(content, path)


def parse_unit(content: bytes, path: Place) -> UnitRecord:
    """Parse the record in a file's content. Raises UserError, naming the file, where it is none."""
    remedy = "delete it and run the same `prep encode`, which makes its unit again"
    unit = parse_record(content, path, UnitRecord.from_json, remedy)
    if normalize("NFC", unit.name) != normalize("NFC", path.name.removesuffix(".json")):
        raise UserError(
            f"{path} is the record of another unit ({unit.name}), whose samples would count twice; "
            "remove the copy"
        )
    return unit


def unit_files(cache: CachePaths) -> list[Place]:
    """Return the files of all records, by name."""
    return [cache.units / name for name in file_sizes(cache.units) if name.endswith(".json")]


def fold(identity: Identity, units: list[UnitRecord], versions: Mapping[str, str]) -> Manifest:
    """Return the manifest that these units add up to."""
    shards = tuple(shard for unit in units for shard in unit.shards)
    rejected = Counter[str]()
    for unit in units:
        rejected.update(unit.rejected)
    sums = [unit.sums for unit in units if unit.sums is not None]
    mean, std = reduce(add, sums).mean_std() if sums else ([], [])
    return Manifest(
        identity=identity,
        layouts=tuple(sorted({shard.layout for shard in shards}, key=_by_json)),
        shards=shards,
        totals=Totals(
            written=sum(unit.written for unit in units),
            read=sum(unit.read for unit in units),
            rejected=dict(sorted(rejected.items())),
            units=len(units),
            bytes=sum(shard.size for shard in shards),
            truncated_captions=sum(unit.truncated_captions for unit in units),
        ),
        statistics={"latents_mean": mean, "latents_std": std},
        versions=versions,
    )


def _by_json(layout: Layout) -> str:
    return json.dumps(layout.to_json(), sort_keys=True)


def write_manifest(cache: CachePaths, manifest: Manifest) -> None:
    """Publish `manifest.json`."""
    publish([dump_json(manifest.to_json())], cache.manifest, cache.tmp)


def open_manifest(root: Place, check_sizes: bool = True) -> Manifest:
    """Read a finished cache's manifest and, unless told otherwise, check every shard's size.

    Raises UserError where it is missing, unfinished, of another format or damaged.
    """
    cache = CachePaths(root)
    content = read_if_there(cache.manifest)
    if content is None:
        if cache.identity.exists():
            raise UserError(f"{root} is unfinished: run the same `{command_of(cache)}` to its end")
        raise UserError(
            f"{root} is not a cache (no manifest.json); `prep encode --cache {root}` makes one"
        )
    manifest = parse_record(
        content, cache.manifest, lambda stored: _manifest(stored, root), "run `prep finish`"
    )
    if check_sizes:
        check_shards(cache, manifest)
    return manifest


def _manifest(stored: Mapping[str, Any], root: Place) -> Manifest:
    refuse_format(stored, root)
    layouts = tuple(map(Layout.from_json, typed(stored["layouts"], list[Any], "layouts")))
    rows = typed(stored["shards"], tuple[Mapping[str, Any], ...], "shards")
    numbers = tuple(typed(row.get("layout"), int, "layout") for row in rows)
    not_negative(layout=min(numbers, default=0))
    shards = tuple(
        Shard.from_json({**row, "layout": layouts[number]})
        for row, number in zip(rows, numbers, strict=True)
    )
    totals = record_of(Totals, stored["totals"], ignore_unknown=True)
    not_negative(written=totals.written)
    return Manifest(
        _identity(typed(stored["identity"], Mapping[str, Any], "identity")),
        layouts, shards, totals,
        typed(stored["statistics"], Mapping[str, list[float]], "statistics"),
        typed(stored["versions"], Mapping[str, str], "versions"),
        typed(stored.get("holdout", ""), str, "holdout"),
    )  # fmt: skip


def _identity(stored: Mapping[str, Any]) -> Identity:
    try:
        return Identity.from_json(stored)
    except ValueError as error:
        raise ValueError(f"its identity is not one that `prep encode` writes: {error}") from None


def check_shards(cache: CachePaths, manifest: Manifest) -> None:
    """Raise UserError where a shard is missing or has another size than its record says."""
    again = f"`prep verify` lists what is, `{manifest.identity.command}` makes it again"
    refuse_damage(cache, manifest.shards, again)


class FileOfRecord(Protocol):
    """A shard as a record names it."""

    @property
    def file(self) -> str:
        """It is relative to the folder that the record is about."""

    @property
    def size(self) -> int:
        """Its bytes."""


def refuse_damage(cache: CachePaths, shards: Sequence[FileOfRecord], remedy: str) -> None:
    """Raise UserError where one of the shards is missing or has another size."""
    sizes = file_sizes(cache.shards)
    for shard in shards:
        size = sizes.get(shard.file.removeprefix("shards/"))
        if size != shard.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(
                f"{cache.root / shard.file} {found}, {shard.size} recorded: the cache is damaged; "
                f"{remedy}"
            )
