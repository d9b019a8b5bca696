"""What evaluations have found, in one table for all runs that can be compared, and what runs cost.

The table is that of `train compare`. A run that has no place in it is told with the reason, and its
figures stand by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infer.compare.records import Record, peak_memory
from infer.compare.settings import NOTHING
from shared.errors import UserError
from shared.storage.files import parse_record
from shared.storage.reading import read_if_there
from shared.wording import duration, rate, size_of
from train.comparison.summary import Summary, check_comparable, read_summary
from train.comparison.table import WORDS, note, table_lines
from train.evaluation.record import EVALUATION
from train.evaluation.table import FORMATS
from train.measures.space import digits

FD = "FD"
ALONE = ("run", "steps", FD, "accuracy", "sharpness")
ALONE_WORDS = 1  # column of words
SHOWN_ALONE = ("accuracy", "high_frequency")
COST = ("run", "objective", "student", "state", "steps", "samples", "trained for", "speed",
        "peak memory", "last loss")  # fmt: skip
COST_WORDS = 4


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `words` columns are no numbers. `**` marks a best figure."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int
    note: str = ""


@dataclass(frozen=True)
class Figures:
    """The evaluations of runs: tables, and why not all is in one."""

    tables: tuple[Table, ...]
    remarks: tuple[str, ...]


def figures_of(records: Sequence[Record]) -> Figures:
    """Put the evaluations of runs into as few tables as can be; remarks tell damaged ones."""
    evaluated = [one for one in records if (one.folder / EVALUATION).is_file()]
    groups, alone, remarks = list[list[Summary]](), list[Record](), list[str]()
    for record in evaluated:
        try:
            summary = read_summary(record.folder, record.name, None)
        except UserError as error:
            alone.append(record)
            remarks.append(str(error))
            continue
        remarks += place(summary, groups)
    tables = [table_of(group) for group in groups]
    rows = list[tuple[str, ...]]()
    for record in alone:
        try:
            rows += rows_of(record)
        except UserError as error:
            remarks.append(str(error))
    if rows:
        tables.append(Table(ALONE, tuple(rows), ALONE_WORDS))
    without = [one.name for one in records if one not in evaluated]
    if without and evaluated:
        remarks.append(f"not evaluated yet: {', '.join(without)}")
    return Figures(tuple(tables), tuple(dict.fromkeys(remarks)))


def place(summary: Summary, groups: list[list[Summary]]) -> list[str]:
    """Put a run into the first group that it can be compared with; returns why not another."""
    reasons = []
    for group in groups:
        try:
            check_comparable(group[0], summary)
        except UserError as error:
            reasons.append(str(error))
        else:
            group.append(summary)
            return []
    groups.append([summary])
    return reasons[:1]


def table_of(group: Sequence[Summary]) -> Table:
    """The table of `train compare`."""
    headings, *rows = table_lines(group, bold=True)
    return Table(tuple(headings), tuple(map(tuple, rows)), WORDS, note(group))


def rows_of(record: Record) -> list[tuple[str, ...]]:
    """The students' lines of an evaluation that can be compared with no other.

    Raises UserError where the file is damaged.
    """

    def build(stored: Mapping[str, Any]) -> list[tuple[str, ...]]:
        title = str(stored.get("fd_title", FD))
        formats = FORMATS | {"fd": digits(title)}
        measure = "" if title == FD else f" ({title})"
        rows = [row for row in stored["rows"] if row["sampler"] == "student"]
        return [
            (record.name, str(int(row["steps"])), number(row["fd"], formats["fd"]) + measure,
             *(number(row.get(name), formats[name]) for name in SHOWN_ALONE))
            for row in rows
        ]  # fmt: skip

    path = record.folder / EVALUATION
    again = f"`python -m train evaluate --run {record.folder}` makes it anew"
    return parse_record(read_if_there(path) or b"", path, build, again)


def number(value: float | None, form: str) -> str:
    """A figure; a dash for none."""
    return NOTHING if value is None else format(float(value), form)


def cost_of(records: Sequence[Record]) -> Table:
    """What each run is, how far it has come, and what that took."""
    return Table(COST, tuple(map(spent, records)), COST_WORDS)


def spent(record: Record) -> tuple[str, ...]:
    """A run's line of the table."""
    config, seconds, memory = record.config, record.seconds, peak_memory(record)
    speed = record.steps * record.batch_size / seconds if seconds else None
    last = record.metrics.get("loss")
    losses = [] if last is None else [value for value in last.tolist() if value == value]
    return (
        record.name, config.objective, config.student, record.state,
        f"{record.reached:,} of {config.max_train_steps:,}", f"{record.samples:,}",
        NOTHING if seconds is None else duration(seconds),
        NOTHING if speed is None else rate(speed, "sample"),
        NOTHING if memory is None else f"{size_of(memory[0])} ({memory[1]})",
        f"{losses[-1]:.4g}" if losses else NOTHING,
    )  # fmt: skip
