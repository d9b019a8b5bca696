"""The previews in the page of runs: the right pictures, and never too many for its size."""

import base64
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from infer.compare.page import html_of
from infer.compare.previews import gallery_of
from infer.compare.records import read_records
from tests.support.compared import Page, copied, evaluations, write_lines
from train.sampling.pictures import GRID, grid_of, write_grid

PROMPTS = ("a red circle", "<b>a</b> {{ star }}")
COLUMNS = ("1 step", "4 steps")


@pytest.fixture(scope="module")
def made(made):
    return made["pcm"]


@pytest.fixture
def run(made, tmp_path):
    """A run of one's own, without previews."""
    return copied(made, tmp_path / "runs" / "mine")


def flat(level, side):
    return np.full((side, side, 3), level, np.uint8)


def write_preview(run, step, pictures, prompts=PROMPTS):
    """`pictures(row, column)` as the trainer writes them."""
    (run / "previews").mkdir(exist_ok=True)
    rows = [[pictures(row, column) for column in range(2)] for row in range(len(prompts))]
    write_grid(run / "previews" / f"step-{step:08d}.png", rows, COLUMNS, prompts)


def decoded(uri):
    data = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.parametrize("side", [40, 100])
def test_a_sheet_tells_where_its_pictures_are(tmp_path, side):
    """Small ones are enlarged in the sheet; what is cut out and made small again is what was in."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 2, side, side + 8, 3), np.uint8)
    write_grid(tmp_path / "a.png", [list(row) for row in noise], COLUMNS, PROMPTS)
    with Image.open(tmp_path / "a.png") as sheet:
        grid = grid_of(sheet.info[GRID], sheet.size)
        assert (grid.columns, grid.labels) == (COLUMNS, PROMPTS)
        for row in range(2):
            for column in range(2):
                found = np.asarray(sheet.crop(grid.box(row, column)))
                assert np.array_equal(found[:: grid.zoom, :: grid.zoom], noise[row, column])
        assert grid_of(sheet.info[GRID], (sheet.width + 1, sheet.height)) is None
    for damaged in (None, "", "[]", '{"columns": 3}', "[" * 100_000):
        assert grid_of(damaged, (1, 1)) is None


def test_pictures_lie_by_run_step_drawing_steps_and_prompt(run, tmp_path):
    other = copied(run, tmp_path / "runs" / "other")
    write_preview(run, 10, lambda row, column: flat(40 + 60 * row + 30 * column, 64))
    write_preview(run, 200, lambda row, column: flat(240, 64))
    write_preview(other, 10, lambda row, column: flat(10, 64), prompts=PROMPTS[::-1])
    page = Page(html_of([run, other]))
    told = page.blocks["shown"]
    assert told["steps"] == [10, 200]
    assert told["prompts"] == list(PROMPTS)
    first, second = told["runs"]
    assert [sheet["step"] for sheet in first] == [10, 200]
    assert second[0]["prompts"] == list(PROMPTS[::-1])
    for row in range(2):
        for column in range(2):
            found = decoded(first[0]["pictures"][column][row])
            assert found.shape == (64, 64, 3)
            assert np.abs(found - (40 + 60 * row + 30 * column)).max() < 6
    labels = [image["alt"] for image in page.all("img")]
    assert labels == list(PROMPTS) * 2
    assert page.all("b") == [a for a in page.all("b") if not a]
    assert "<b>a</b> {{ star }}" in page.text
    assert "Left out" not in page.text


def test_sheets_of_older_versions_are_shown_whole_and_damaged_ones_not(run):
    (run / "previews").mkdir()
    Image.new("RGB", (300, 200), "red").save(run / "previews" / "step-00000005.png")
    (run / "previews" / "step-00000006.png").write_bytes(b"\x89PNG no more")
    page = Page(html_of([run]))
    (whole,) = page.blocks["shown"]["runs"][0]
    assert whole["columns"] == []
    assert decoded(whole["pictures"][0][0]).shape == (200, 300, 3)
    assert page.blocks["shown"]["steps"] == [5]
    assert "Left out: previews of mine that cannot be read (step 6)." in page.text
    assert [image["alt"] for image in page.all("img")] == ["previews of mine"]


def test_what_is_too_large_is_shown_smaller_and_at_fewer_steps(run):
    """Noise hardly compresses: 12 sheets of four 200 px pictures."""
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 256, (200, 200, 3), np.uint8) for _ in range(4)]
    for step in range(1, 13):
        write_preview(run, step, lambda row, column: noise[2 * row + column])
    records, _ = read_records([run])
    everything = gallery_of(records)
    assert len(everything.runs[0]) == 12
    assert everything.left_out == ""
    sizes = [sheet.size for sheet in everything.runs[0]]
    fewer = gallery_of(records, sum(sizes) // 3)
    shown = sum(sheet.size for sheet in fewer.runs[0])
    assert shown <= sum(sizes) // 3
    steps = [sheet.step for sheet in fewer.runs[0]]
    assert steps[-1] == 12
    assert "detail of pictures larger than" in fewer.left_out
    few = gallery_of(records, 12_000)
    assert [sheet.step for sheet in few.runs[0]][-1] == 12
    assert f"{12 - len(few.runs[0])} of 12 previews" in few.left_out
    assert sum(sheet.size for sheet in few.runs[0]) <= 12_000
    none = gallery_of(records, 10)
    assert none.runs == ((),)
    assert none.left_out


@pytest.mark.slow
def test_a_page_of_long_trainings_stays_small(run, tmp_path):
    """40,000 lines of metrics each: lows and highs stay, and the page says what is not shown."""
    runs = [run, *(copied(run, tmp_path / "runs" / f"{n}") for n in range(3))]
    losses = np.random.default_rng(0).random(40_000) + 1
    losses[12_345], losses[23_456] = 9.0, 0.25
    lines = [{"step": 10 * n + 10, "loss": float(loss), "samples_per_second": 4.0}
             for n, loss in enumerate(losses)]  # fmt: skip
    for one in runs:
        write_lines(one / "metrics.jsonl", lines)
        evaluations(one, *((step, 80.0, 0.5) for step in range(100, 2100, 100)))
    text = html_of(runs)
    assert len(text.encode()) < 3_000_000
    page = Page(text)
    for curve in page.curves("loss"):
        assert len(curve["y"]) <= 2_000
        assert {9.0, 0.25} <= set(curve["y"])
        assert (curve["step"][0], curve["step"][-1]) == (10, 400_000)
        places = (curve["step"] / 10 - 1).astype(int)
        assert np.array_equal(curve["y"], losses[places])
    assert "of the longest run 38,00" in page.text


def test_an_older_line_may_hold_anything(run):
    lines = ['{"step": 1, "loss": 1e400}', '{"step": 2, "loss": true, "samples_per_second": 0}',
             '{"step": 1' + "0" * 400 + "}", "[1]", '"text"',
             json.dumps({"step": 3, "loss": 0.5, "samples_per_second": 2.0})]  # fmt: skip
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "evaluations.jsonl").write_text('{"step": 3}\n' + os.fsdecode(b"\xff") * 0 + "{}\n")
    page = Page(html_of([run]))
    (curve,) = page.curves("loss")
    assert (curve["step"].tolist(), curve["y"].tolist()) == ([3], [0.5])
    assert (
        "mine : 3 damaged lines of metrics.jsonl are left out; 2 damaged lines of evaluations.jsonl"
        in page.text
    )
