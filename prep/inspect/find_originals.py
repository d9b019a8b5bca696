"""Where the pictures behind a cache's samples are looked for, and where not.

A cache may come from anybody. So the addresses that its records name are not asked: only what the
user names is, with --shards, and otherwise local files.
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from prep.rows.unit import NUMBER
from prep.sources.find import PIPE, SourceOptions, Unit, find_units, options_of
from prep.sources.tables.open_dataset import HUB
from shared.cache.units import UnitRecord
from shared.errors import UserError
from shared.sanitize import visible
from shared.storage.urls import is_url

HASH = re.compile(r"-[0-9a-f]{8}$")  # of the full source, at the end of a unit's name
SHOWN = 80  # characters of a source


class WrongShards(UserError):
    """The user's --shards cannot be found, which says nothing of the cache."""


class Originals:
    """What may be read: `shards` as typed, or units that were found already; and local files."""

    def __init__(self, shards: Sequence[str] = (), units: Sequence[Unit] = ()) -> None:
        self.shards, self.units = tuple(shards), list(units)
        self.unasked: Counter[str] = Counter()  # samples by the source that was not asked for them
        self._found: dict[SourceOptions, list[Unit]] = {}

    def of(self, record: UnitRecord, samples: int) -> list[Unit]:
        """Find the units in which `samples` of a unit may be; note what is not asked.

        Raises WrongShards for `shards` that name nothing.
        """
        named = self._named(record)
        for alike in ALIKE:  # the same; moved elsewhere; moved, or a folder split in other units
            if found := [unit for unit in named if alike(unit.name) == alike(record.name)]:
                return found
        source = record.source
        if source.startswith(PIPE) or is_url(source) or HUB.fullmatch(source):
            self.unasked[source] += samples
            return []
        quoted = re.sub(r"([{}\\])", r"\\\1", glob.escape(source))  # as --shards takes it
        with contextlib.suppress(UserError):  # a source that cannot be read any more
            units = find_units([quoted], options_of(record.source_state))
            return [unit for unit in units if unit.name == record.name] or units
        return []

    def unasked_note(self) -> str:
        """Write a sentence on the sources that were not asked, or nothing."""
        if not self.unasked:
            return ""
        first, samples = next(iter(self.unasked)), self.unasked.total()
        more = f" and {len(self.unasked) - 1} more places" if len(self.unasked) > 1 else ""
        return (
            f"the originals of {samples} samples are at {visible(first, SHOWN)}{more}, "
            "which is asked only if you name it: pass --shards as for encode"
        )

    def _named(self, record: UnitRecord) -> list[Unit]:
        if not self.shards:
            return self.units
        options = replace(options_of(record.source_state), pipes=True)
        if options not in self._found:
            try:
                self._found[options] = find_units(self.shards, options)
            except UserError as error:
                raise WrongShards(str(error)) from None
        return self._found[options]


ALIKE: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: HASH.sub("", name),
    lambda name: NUMBER.sub("", HASH.sub("", name)),
)
