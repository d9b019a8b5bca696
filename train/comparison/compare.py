"""`train compare`: students of several runs side by side, from the evaluations that they have."""

from __future__ import annotations

from shared.errors import UsageError
from shared.storage.files import dump_json, guard, publish
from train.comparison.picture import draw_columns, open_canvas
from train.comparison.summary import read_summaries
from train.comparison.table import markdown, note, report
from train.config import CompareConfig
from train.sampling.pictures import write_grid


def compare(config: CompareConfig) -> None:
    """Write compare.json, compare.md and compare.png, and print the table.

    Raises UserError where runs cannot be compared, before anything is written.
    """
    if not config.runs:
        raise UsageError("which runs? For example: python -m train compare runs/a runs/b")
    summaries = read_summaries(config.runs, config.model)
    folder = config.output
    with guard(folder):
        folder.mkdir(parents=True, exist_ok=True)
    told, written = note(summaries), ["compare.md"]
    if config.num_captions:
        canvas = open_canvas(config, summaries)
        columns = draw_columns(config, summaries, canvas)
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        write_grid(folder / "compare.png", rows, list(columns), canvas.heldout.captions)
        written.append("compare.png")
    publish([dump_json(report(summaries))], folder / "compare.json", folder)
    publish([f"{markdown(summaries)}\n\n{told}\n".encode()], folder / "compare.md", folder)
    paths = "\n".join(str(folder / name) for name in written)
    print(f"{markdown(summaries, bold=False)}\n\n{told}\n\n{paths}")
