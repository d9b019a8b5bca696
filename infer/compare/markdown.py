"""The same as the page without its curves and pictures, as Markdown: compare.md."""

from __future__ import annotations

import re
from collections.abc import Sequence

from infer.compare.contents import Contents
from infer.compare.curves import Chart
from infer.compare.figures import Table
from infer.compare.page import LONGEST
from infer.compare.settings import Setting
from shared.sanitize import LONGEST as SHORT
from shared.sanitize import visible
from train.evaluation.table import aligned

SPECIAL = re.compile(r"[\\|`*\[\]<&#]")  # what would be Markdown's or HTML's in a name
CODE = re.compile(r"(?<!`)(`[^`]+`)(?!`)")


def markdown(contents: Contents) -> str:
    """All tables of the comparison, under headings."""
    lines = (contents.lead, f"{contents.amount}.")
    parts = [f"# {contents.title}", " ".join(escaped(line) for line in lines if line)]
    parts += ["## Runs and what they cost", table(contents.cost)]
    remarks = [f"{one.name}: {line}" for one in contents.records for line in one.remarks]
    remarks += [f"A run is left out: {line}" for line in contents.unread]
    parts.append(listed(remarks))
    measured = [chart for chart in contents.charts if chart.measured]
    if measured:
        parts += ["## While they trained", table(measured_table(measured, contents.names))]
    if contents.figures.tables or contents.figures.remarks:
        parts.append("## Evaluations")
        for one in contents.figures.tables:
            parts += [table(one), *([one.note] if one.note else [])]
        parts.append(listed(contents.figures.remarks))
    parts.append("## Settings")
    if contents.settings.differing:
        parts.append(settings(contents.settings.differing, contents.names))
    parts += ["<details><summary>The others are the same</summary>",
              settings(contents.settings.same, ["value"]), "</details>"]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def listed(remarks: Sequence[str]) -> str:
    """Remarks as items of a list."""
    return "\n".join(f"- {prose(one)}" for one in remarks)


def prose(text: str) -> str:
    """The same as `escaped` of a remark, whose `code` stays code: nothing in it is HTML."""
    parts = CODE.split(visible(text, LONGEST))
    return "".join(part if i % 2 else escaped(part, LONGEST) for i, part in enumerate(parts))


def escaped(text: str, longest: int = SHORT) -> str:
    """Text of others on one line, in which nothing is Markdown."""
    return SPECIAL.sub(lambda found: f"\\{found[0]}", visible(text, longest)).replace("\\<", "&lt;")


def table(one: Table) -> str:
    """A table; words are escaped, figures may be bold."""
    rows = [
        [escaped(text) if place < one.words else text for place, text in enumerate(row)]
        for row in one.rows
    ]
    return aligned([list(one.headings), *rows], one.words)


def settings(rows: Sequence[Setting], names: Sequence[str]) -> str:
    """Flags as rows, runs as columns."""
    lines = [["", *map(escaped, names)]]
    lines += [[f"`{one.name}`", *map(escaped, one.values)] for one in rows]
    return aligned(lines, len(names) + 1)


def measured_table(charts: Sequence[Chart], names: Sequence[str]) -> Table:
    """The last and the best of each curve of evaluations while the runs trained."""
    rows = []
    for chart in charts:
        for curve in chart.curves:
            values, steps = curve.values, curve.at.step
            best = int(values.argmin() if chart.key.startswith("fd") else values.argmax())
            rows.append(
                (f"{names[curve.run]} {curve.label}", chart.title, f"{values[best]:.4g}",
                 f"{steps[best]:,.0f}", f"{values[-1]:.4g}", f"{steps[-1]:,.0f}")
            )  # fmt: skip
    return Table(("run", "figure", "best", "at step", "last", "at step"), tuple(rows), 2)
