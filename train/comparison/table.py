"""The comparison as people see it: terminal, Markdown, JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

from shared.wording import duration
from train.comparison.summary import Summary
from train.evaluation.score import Result
from train.evaluation.table import FORMATS, aligned, cell, features_note, headings
from train.measures.space import digits

WORDS = 3  # columns of words, before those of numbers
# What is better of two figures is smaller of these.
BEST: Mapping[str, Callable[[float], float]] = {
    "fd": lambda value: value,
    "precision": lambda value: -value,
    "recall": lambda value: -value,
    "accuracy": lambda value: -value,
    "high_frequency": lambda value: abs(value - 1),
}
NOTE = (
    "{samples} held-out captions, guidance_scale {guidance:g}. Steps: of drawing. {features} "
    "Sharpness: high-frequency energy relative to the teacher's "
    "most steps. Step cost: arithmetic of a training step per sample, in those of LCD with the "
    "same kind of student. Samples: seen in training. Trained for: the steps alone, without "
    "previews and checkpoints."
)


def report(summaries: Sequence[Summary]) -> dict[str, Any]:
    """The content of compare.json."""
    first = summaries[0].evaluation
    return {
        "conditions": asdict(first.conditions),
        "eval_cache": first.eval_cache,
        "fd_note": first.fd_note,
        "runs": [described(one) for one in summaries],
        "teachers": [
            {
                "teacher": one.evaluation.teacher,
                "runs": [each.name for each in summaries if same_teacher(each, one)],
                "rows": [asdict(result) for result in teacher_rows(one)],
            }
            for one in with_teachers(summaries)
        ],
    }


def described(summary: Summary) -> dict[str, Any]:
    """A run in compare.json."""
    return {
        "run": str(summary.run),
        "name": summary.name,
        "objective": summary.config.objective,
        "student": summary.config.student,
        "weights": summary.evaluation.weights,
        "eta": summary.evaluation.eta,
        "step_cost": summary.cost,
        "training_steps": summary.steps,
        "samples_seen": summary.samples,
        "training_seconds": summary.seconds,
        "rows": [asdict(result) for result in student_rows(summary)],
    }


def student_rows(summary: Summary) -> list[Result]:
    """The lines of a run's student."""
    return [row for row in summary.evaluation.rows if row.sampler == "student"]


def teacher_rows(summary: Summary) -> list[Result]:
    """The lines of its teacher: that of most steps, then for each number of few the best solver."""
    rows = [row for row in summary.evaluation.rows if row.sampler != "student"]
    reference = max(rows, key=lambda row: row.steps)
    counts = sorted({row.steps for row in rows} - {reference.steps})
    few = [min((r for r in rows if r.steps == n), key=lambda row: row.fd) for n in counts]
    return [reference, *few]


def same_teacher(one: Summary, other: Summary) -> bool:
    """Was it the same teacher, drawn through the same VAE?"""
    return one.evaluation.teacher == other.evaluation.teacher


def with_teachers(summaries: Sequence[Summary]) -> list[Summary]:
    """For each teacher the first run that has it."""
    found: dict[str, Summary] = {}
    for one in summaries:
        found.setdefault(one.evaluation.teacher, one)
    return list(found.values())


def teacher_title(summary: Summary, summaries: Sequence[Summary]) -> str:
    """What its teacher is called: where there are several, by the first of its runs."""
    return "teacher" if len(with_teachers(summaries)) == 1 else f"teacher of {summary.name}"


def markdown(summaries: Sequence[Summary], bold: bool = True) -> str:
    """The table: teachers, then runs; the best figure of a number of steps in `bold`."""
    return aligned(table_lines(summaries, bold), WORDS)


def table_lines(summaries: Sequence[Summary], bold: bool) -> list[list[str]]:
    """The cells of the table, its headings first; the best figures between `**` if `bold`."""
    columns = figures_shown(summaries)
    lines = [["run", "objective", "student", "steps", *columns.values(), "step cost", "samples",
              "trained for"]]  # fmt: skip
    for one in with_teachers(summaries):
        title = teacher_title(one, summaries)
        for row in teacher_rows(one):
            spacing = f" ({row.timestep_spacing})" if row.timestep_spacing else ""
            cells = figures(row, columns)
            lines.append([title, f"{row.sampler}{spacing}", "-", *cells, "-", "-", "-"])
    rows = [row for one in summaries for row in student_rows(one)]
    for one in summaries:
        for row in student_rows(one):
            marks = best_of(row, rows) if bold else set()
            lines.append([*words(one), *figures(row, columns, marks), *spent(one)])
    return lines


def words(summary: Summary) -> list[str]:
    """A run's name, objective and kind of student."""
    eta = summary.evaluation.eta
    objective = summary.config.objective + (f", eta {eta:g}" if eta else "")
    return [summary.name, objective, summary.config.student]


def figures_shown(summaries: Sequence[Summary]) -> dict[str, str]:
    """The columns of figures and their titles: those that an evaluation has."""
    found: dict[str, str] = {}
    for one in summaries:
        titles = headings(one.evaluation)
        found |= {name: titles[name] for name in BEST if name in titles}
    return {name: found[name] for name in BEST if name in found}


def figures(row: Result, columns: Mapping[str, str], marks: Set[str] = frozenset()) -> list[str]:
    """Steps and figures of a line; those in `marks` are bold, and a dash stands for none."""
    formats = FORMATS | {"fd": digits(columns["fd"])}
    cells = [str(row.steps)]
    for name in columns:
        text = cell(row, name, formats)
        value, space, interval = text.partition(" ")
        cells.append(f"**{value}**{space}{interval}" if name in marks else text)
    return cells


def spent(summary: Summary) -> list[str]:
    """What a run's training took."""
    samples, seconds = summary.samples, summary.seconds
    return [
        f"{summary.cost:.2f}",
        "-" if samples is None else f"{samples:,}",
        "-" if seconds is None else duration(seconds),
    ]


def best_of(row: Result, rows: Sequence[Result]) -> set[str]:
    """The figures in which no other of `rows` with as many steps is better than `row`."""
    rivals = [one for one in rows if one.steps == row.steps]
    if len(rivals) < 2:
        return set()
    found = set()
    for name, badness in BEST.items():
        values = [value for one in rivals if (value := getattr(one, name)) is not None]
        mine = getattr(row, name)
        if mine is not None and badness(mine) == min(map(badness, values)):
            found.add(name)
    return found


def note(summaries: Sequence[Summary]) -> str:
    """What the columns mean, and what to know of the distances."""
    first = summaries[0].evaluation
    rows = [row for one in summaries for row in one.evaluation.rows]
    text = NOTE.format(
        samples=f"{first.num_samples:,}",
        guidance=first.guidance_scale,
        features=features_note(first, rows),
    )
    return f"{text}\n\n{first.fd_note}" if first.fd_note else text
