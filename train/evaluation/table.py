"""The evaluation as people see it: terminal, Markdown, JSON and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.storage.files import dump_json, publish
from train.evaluation.record import EVALUATION, Evaluation
from train.sampling.pictures import write_grid

HEADINGS = {
    "sampler": "sampler",
    "steps": "steps",
    "fd": "FD",
    "accuracy": "accuracy",
    "latent_mse": "latent MSE",
    "high_frequency": "sharpness",
    "ms_per_image": "ms/image",
}
FORMATS = {"fd": ".1f", "accuracy": ".3f", "latent_mse": ".3f", "high_frequency": ".2f",
           "ms_per_image": ".1f"}  # fmt: skip


def write_report(
    folder: Path,
    evaluation: Evaluation,
    columns: Mapping[str, NDArray[np.uint8]],
    captions: Sequence[str],
) -> None:
    """Write evaluation.json, .md and .png into `folder` and print the table and their paths."""
    table = markdown([asdict(result) for result in evaluation.rows])
    note = (
        f"{evaluation.student} student, guidance_scale {evaluation.guidance_scale:g}, "
        f"{evaluation.num_samples} held-out captions. FD: Fréchet distance in "
        f"{evaluation.features} features. Latent MSE: 1 step, against the teacher's 50 from the "
        "same noise. Sharpness: high-frequency energy relative to the teacher's 50 steps. "
        "ms/image without decoding."
    )
    if evaluation.fd_note:
        note += f"\n\n{evaluation.fd_note}"
    picture = folder / "evaluation.png"
    count = len(next(iter(columns.values())))
    rows = [[images[i] for images in columns.values()] for i in range(count)]
    write_grid(picture, rows, list(columns), captions[:count])
    publish([dump_json(asdict(evaluation))], folder / EVALUATION, folder)
    publish([f"{table}\n\n{note}\n".encode()], folder / "evaluation.md", folder)
    print(f"{table}\n\n{note}\n\n{folder / 'evaluation.md'}\n{picture}")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of an evaluation as a table."""
    return aligned(
        [list(HEADINGS.values()), *[[cell(row, name) for name in HEADINGS] for row in rows]]
    )


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


def cell(row: Mapping[str, Any], name: str) -> str:
    """One figure as text; a dash for null."""
    value = row[name]
    if value is None:
        return "-"
    if name == "sampler" and value != "student":
        spacing = row["timestep_spacing"]
        return f"teacher, {value}{f' ({spacing})' if spacing else ''}"
    return format(value, FORMATS.get(name, ""))
