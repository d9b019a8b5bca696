"""All that the page and the Markdown show of runs, gathered once for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infer.compare.curves import Chart, charts_of
from infer.compare.figures import Figures, Table, cost_of, figures_of
from infer.compare.previews import Gallery, gallery_of
from infer.compare.records import Record, read_records
from infer.compare.settings import Settings, settings_of
from shared.sanitize import visible
from shared.wording import counted, duration

SEVERAL = 4  # settings that the first sentence names


@dataclass(frozen=True)
class Contents:
    """Runs, and what there is to see of them."""

    records: tuple[Record, ...]
    settings: Settings
    charts: tuple[Chart, ...]
    figures: Figures
    cost: Table
    gallery: Gallery
    unread: tuple[str, ...] = ()  # why other runs are not shown

    @property
    def names(self) -> list[str]:
        """The runs' names, as they may be shown."""
        return [visible(one.name) for one in self.records]

    @property
    def title(self) -> str:
        """What stands above all."""
        return f"{counted(len(self.records), 'run')} side by side"

    @property
    def lead(self) -> str:
        """What the runs differ in, in a sentence; nothing for one."""
        if len(self.records) < 2:
            return ""
        names = [setting.name for setting in self.settings.differing]
        if not names:
            return "Their settings are the same."
        more = f" and {len(names) - SEVERAL} more" if len(names) > SEVERAL else ""
        return f"They differ in {', '.join(names[:SEVERAL])}{more}."

    @property
    def mixed(self) -> bool:
        """Are the losses those of several objectives, and so not to be compared?"""
        return len({(one.config.objective, one.config.loss_type) for one in self.records}) > 1

    @property
    def amount(self) -> str:
        """How much training this is about."""
        samples = sum(one.samples for one in self.records)
        seen = f"{counted(samples, 'sample')} seen"
        known = [one.seconds for one in self.records if one.seconds is not None]
        if not known:
            return seen
        unknown = sum(one.steps > 0 and one.seconds is None for one in self.records)
        but = f", and in {counted(unknown, 'run')} of unknown speed" if unknown else ""
        return f"{seen} in {duration(sum(known))} of training{but}"


def gather(runs: Sequence[Path]) -> Contents:
    """Read all that there is of these runs.

    Raises UsageError where none is named, and UserError for a folder that is no run, and where not
    one of them can be read.
    """
    records, unread = read_records(runs)
    return Contents(
        tuple(records), settings_of(records), tuple(charts_of(records)), figures_of(records),
        cost_of(records), gallery_of(records), tuple(unread),
    )  # fmt: skip
