"""The evaluation as people see it: terminal, Markdown, JSON and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.storage.files import dump_json, publish
from train.evaluation.nearest import sheet_in
from train.evaluation.nearest import told as told_of_copies
from train.evaluation.record import EVALUATION, Evaluation
from train.evaluation.score import Result
from train.measures.space import digits, meaning
from train.sampling.pictures import write_grid

FORMATS = {"fd": ".1f", "accuracy": ".3f", "precision": ".2f", "recall": ".2f",
           "latent_mse": ".3f", "high_frequency": ".2f", "ms_per_image": ".1f"}  # fmt: skip
OPTIONAL = ("precision", "recall")  # columns that are there only if they are asked for


def headings(evaluation: Evaluation) -> dict[str, str]:
    """The columns of an evaluation's table and their titles."""
    found = {
        "sampler": "sampler",
        "steps": "steps",
        "fd": evaluation.fd_title,
        "precision": "precision",
        "recall": "recall",
        "accuracy": evaluation.scorer_title,
        "latent_mse": "latent MSE",
        "high_frequency": "sharpness",
        "ms_per_image": "ms/image",
    }
    unused = {name for name in OPTIONAL if all(getattr(r, name) is None for r in evaluation.rows)}
    return {name: title for name, title in found.items() if name not in unused}


def write_report(
    folder: Path,
    evaluation: Evaluation,
    columns: Mapping[str, NDArray[np.uint8]],
    captions: Sequence[str],
) -> None:
    """Write evaluation.json, .md and .png into `folder` and print the table and their paths."""
    table, told = markdown(evaluation), note(evaluation)
    picture, sheet = folder / "evaluation.png", sheet_in(folder)
    count = len(next(iter(columns.values())))
    rows = [[images[i] for images in columns.values()] for i in range(count)]
    write_grid(picture, rows, list(columns), captions[:count])
    if evaluation.nearest is None:
        sheet.unlink(missing_ok=True)  # another evaluation's
    publish([dump_json(asdict(evaluation))], folder / EVALUATION, folder)
    publish([f"{table}\n\n{told}\n".encode()], folder / "evaluation.md", folder)
    paths = [folder / "evaluation.md", picture, *([sheet] if evaluation.nearest else [])]
    print("\n".join([f"{table}\n\n{told}\n", *map(str, paths)]))


def note(evaluation: Evaluation) -> str:
    """What the columns mean, and what to know of the figures."""
    parts = [
        f"{evaluation.student} student, guidance_scale {evaluation.guidance_scale:g}, "
        f"{evaluation.num_samples} held-out captions. {features_note(evaluation, evaluation.rows)}",
        scorer_note(evaluation),
        "Latent MSE: 1 step, against the teacher's 50 from the same noise. Sharpness: "
        "high-frequency energy relative to the teacher's 50 steps. ms/image without decoding. "
        "±: how far the 95% interval reaches, by bootstrap over captions.",
    ]
    told = [" ".join(part for part in parts if part)]
    if evaluation.fd_note:
        told.append(evaluation.fd_note)
    if evaluation.nearest:
        told.append(told_of_copies(evaluation.nearest, evaluation.num_samples))
    return "\n\n".join(told)


def features_note(evaluation: Evaluation, rows: Sequence[Result]) -> str:
    """What the distance is, with the weights that it depends on, and how large its bias is."""
    title = evaluation.fd_title
    weights = weights_note(evaluation.features_source, evaluation.features_weights)
    text = f"{title}: {meaning(title)} in {evaluation.features} features{weights}"
    biases = [row.fd_bias for row in rows if row.fd_bias is not None]
    if not biases:
        return f"{text}."
    least, most = (format(max(0.0, one), digits(title)) for one in (min(biases), max(biases)))
    span = least if least == most else f"{least} to {most}"
    few = evaluation.num_samples <= (evaluation.num_features or 0)  # see docs/evaluation.md
    return f"{text}, {'at least' if few else 'some'} {span} above that of endlessly many pictures."


def scorer_note(evaluation: Evaluation) -> str:
    """Which weights the scores depend on; nothing of a function's."""
    if evaluation.scorer_weights is None:
        return ""
    weights = weights_note(evaluation.scorer_source, evaluation.scorer_weights)
    return f"{evaluation.scorer_title}: mean over the pictures{weights}."


def weights_note(source: str | None, weights: str | None) -> str:
    """Where weights are from, by the folder's name alone, and their fingerprint, in brackets."""
    if source is None or weights is None:
        return ""
    name = Path(source).expanduser()
    return f" ({name.name if name.exists() else source}, weights {weights})"


def markdown(evaluation: Evaluation) -> str:
    """The rows of an evaluation as a table."""
    columns = headings(evaluation)
    formats = FORMATS | {"fd": digits(evaluation.fd_title)}
    lines = [[cell(row, name, formats) for name in columns] for row in evaluation.rows]
    return aligned([list(columns.values()), *lines])


def aligned(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, as readable in a terminal as on a page: headings, then rows.

    The first `left` columns are words, the others numbers.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [text.rjust(w) if i >= left else text.ljust(w)
         for i, (text, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]  # fmt: skip
    rule = [f"{'-' * (w + 1)}{':' if i >= left else '-'}" for i, w in enumerate(widths)]
    first, *rest = [f"| {' | '.join(line)} |" for line in padded]
    return "\n".join([first, f"|{'|'.join(rule)}|", *rest])


def cell(row: Result, name: str, formats: Mapping[str, str] = FORMATS) -> str:
    """One figure as text, with its interval; a dash for none."""
    value = getattr(row, name)
    if value is None:
        return "-"
    if name == "sampler" and value != "student":
        spacing = row.timestep_spacing
        return f"teacher, {value}{f' ({spacing})' if spacing else ''}"
    form = formats.get(name, "")
    return f"{value:{form}}{margin(row, name, form)}"


def margin(row: Result, name: str, form: str) -> str:
    """How far a figure's interval reaches, ` ±3.1`, ` ±.031`; nothing where it has none.

    To the side where it reaches farther: a distance's ends at 0, and others need not be even.
    """
    value = getattr(row, name)
    low, high = row.intervals.get(name, (value, value))
    if low == high:
        return ""
    return f" ±{max(value - low, high - value):{form}}".replace("±0.", "±.")
