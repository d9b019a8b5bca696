"""Units of work and their shards, as a cache records them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shared.cache.layout import Layout
from shared.cache.sums import ChannelSums
from shared.storage.typed_json import inside, not_negative, record_of, typed

HEX = re.compile(r"([0-9a-f]{64})?")


@dataclass(frozen=True)
class Shard:
    """One shard file of a unit."""

    file: str  # relative to the cache
    layout: Layout
    count: int
    size: int
    sha256: str
    first_key: str = ""  # KEY of its first sample; older caches do not say it
    heldout: tuple[int, ...] = ()  # samples never trained on; said by the manifest alone

    @property
    def trained(self) -> int:
        """Samples that may be trained on."""
        return self.count - len(self.heldout)

    def to_json(self) -> dict[str, Any]:
        """Return it as stored in a unit's record."""
        value = {**vars(self), "layout": self.layout.to_json()}
        del value["heldout"]
        if not self.first_key:
            del value["first_key"]
        return value

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Shard:
        """Invert `to_json`; the layout may be a Layout. Raises ValueError for what no cache has."""
        layout = value.get("layout")
        if not isinstance(layout, Layout):
            layout = Layout.from_json(typed(layout, Mapping[str, Any], "layout"))
        shard = record_of(Shard, {**value, "layout": layout})
        not_negative(count=shard.count, size=shard.size)
        inside("shards", shard.file)
        if any(not 0 <= number < shard.count for number in shard.heldout):
            raise ValueError(f"heldout names samples beyond the {shard.count} there are")
        if not HEX.fullmatch(shard.sha256):
            raise ValueError(f"sha256 is {shard.sha256!r:.100}")
        return shard


@dataclass(frozen=True)
class UnitRecord:
    """The commit record of one unit of work: exactly which files it owns."""

    name: str
    source: str
    source_state: Mapping[str, Any]  # what tells a changed source from an unchanged one
    shards: tuple[Shard, ...]
    samples: str  # relative path of the accounting table
    samples_sha256: str
    read: int
    written: int
    rejected: Mapping[str, int]  # reason -> rows
    truncated_captions: int = 0
    sums: ChannelSums | None = None
    notes: Mapping[str, int] = field(default_factory=dict)  # e.g. samples retried in fp32
    generation: int = 0  # of the settings it was made with; not stored where they are the first

    def __post_init__(self) -> None:
        assert self.written + sum(self.rejected.values()) == self.read, self

    def to_json(self) -> dict[str, Any]:
        """Return it as stored in units/NAME.json."""
        value = {**asdict(self), "shards": [shard.to_json() for shard in self.shards]}
        if self.generation == 0:
            del value["generation"]
        return value

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> UnitRecord:
        """Invert `to_json`. Raises ValueError or NewerRecord for what is no record."""
        shards = [Shard.from_json(shard) for shard in typed(value.get("shards"), list, "shards")]
        unit = record_of(UnitRecord, {**value, "shards": []})
        numbers = {name: getattr(unit, name) for name in ("read", "written", "truncated_captions")}
        not_negative(**numbers, generation=unit.generation, **unit.rejected)
        check_sums(unit.sums, shards)
        if unit.samples:
            inside("samples", unit.samples)
        return replace(unit, shards=tuple(shards))


def check_sums(sums: ChannelSums | None, shards: Sequence[Shard]) -> None:
    """Raise ValueError for sums that are not of the channels that the shards have."""
    if sums is None:
        return
    channels = {shard.layout.fields[0].shape[1] for shard in shards}
    widths = channels | {count // 2 for count in channels}  # with a logvar beside each mean
    if (
        sums.count < 1
        or len(sums.total) != len(sums.squares)
        or (shards and len(sums.total) not in widths)
    ):
        raise ValueError("sums are not those of its latents")
