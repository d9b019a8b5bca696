"""Evaluations in the page of runs: the table of `train compare`, or in a line why not."""

import json
import shutil

import pytest

from infer.compare.page import html_of
from tests.support.compared import Page
from tests.support.comparison import TEACHER, assess, copied, evaluated_runs, few_rows
from train.comparison.summary import read_summaries
from train.comparison.table import table_lines


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory, tiny_cache, tiny_sd):
    runs, _ = evaluated_runs(tmp_path_factory, tiny_sd, tiny_cache)
    return {"lcd": runs["consistency"], "tcd": runs["trajectory"]}


@pytest.fixture
def runs(shared_runs, tmp_path):
    return copied(shared_runs, tmp_path / "own")


def cells(page):
    """The rows of the tables of evaluations, as text."""
    part = page.source.partition('<section id="evaluations">')[2].partition("</section>")[0]
    rows = [row.partition("</tr>")[0] for row in part.split("<tr>")[1:]]
    return [
        Page(row.replace("</th>", "|").replace("</td>", "|")).text.rstrip("| ").split("|")
        for row in rows
    ]


def stripped(lines):
    return [[text.replace("**", "").strip() for text in line] for line in lines]


def test_runs_that_can_be_compared_share_the_table_of_train_compare(runs):
    page = Page(html_of(list(runs.values())))
    wanted = table_lines(read_summaries(list(runs.values()), None), bold=True)
    assert stripped(cells(page)) == stripped(wanted)
    best = [text for line in wanted for text in line if text.startswith("**")]
    assert page.source.count("<strong>") == len(best) > 0
    assert "What is not in one table" not in page.text


def test_a_run_that_cannot_be_compared_has_its_figures_and_a_reason(runs, tmp_path):
    evaluation = runs["tcd"] / "evaluation.json"
    stored = json.loads(evaluation.read_text()) | {"seed": 5}
    evaluation.write_text(json.dumps(stored))
    page = Page(html_of(list(runs.values())))
    assert "was evaluated with seed 0, " in page.text
    assert page.source.count("<th>objective</th>") == 1 + 2  # of the cost, and a table for each
    del stored["heldout"]  # as older versions wrote it
    evaluation.write_text(json.dumps(stored))
    page = Page(html_of(list(runs.values())))
    assert "is an older version's, which did not note its captions" in page.text
    fd = next(row["fd"] for row in stored["rows"] if row["sampler"] == "student")
    alone = [line for line in stripped(cells(page)) if line[:2] == ["tcd", "1"]]
    assert alone[0][2] == f"{fd:.1f}"


def test_a_student_of_another_export_is_said(runs, tmp_path):
    (runs["tcd"] / "evaluation.json").unlink()
    shutil.copy(runs["lcd"] / "evaluation.json", runs["tcd"])
    page = Page(html_of(list(runs.values())))
    assert "is not the one that was evaluated" in page.text
    (runs["tcd"] / "evaluation.json").unlink()
    page = Page(html_of(list(runs.values())))
    assert "not evaluated yet: tcd" in page.text


@pytest.mark.slow
def test_runs_evaluated_on_other_pictures_are_kept_apart(runs, tmp_path, tiny_cache, monkeypatch):
    few_rows(monkeypatch, TEACHER[:2], (1,))
    held = shutil.copytree(tiny_cache, tmp_path / "held")
    assess(runs["tcd"], held, num_samples=66, seed=0)
    page = Page(html_of(list(runs.values())))
    assert "was evaluated on other pictures" in page.text
