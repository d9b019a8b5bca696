"""`infer compare` of damaged runs beside whole ones, and of folders that are no runs."""

import json
import shutil

import pytest

from infer.compare.markdown import prose
from infer.compare.page import html_of
from tests.support.compared import Page, write_lines


@pytest.fixture
def compare(cli, tmp_path):
    return lambda *words: cli("infer", "compare", *words, "--output", tmp_path / "out")


def line_of(answer):
    """The one line of an error."""
    assert (answer.status, answer.out) == (1, "")
    assert answer.err.count("\n") == 1
    return answer.err


def test_a_run_of_damaged_flags_is_told_beside_the_others(runs, compare, tmp_path):
    (runs["lcd"] / "config.json").write_text("{")
    answer = compare(*runs.values())
    assert answer.status == 0
    assert "1 run, up to step 4" in answer.out
    assert answer.err.startswith("note: left out: ")
    assert answer.err.count("\n") == 1
    for file in ("index.html", "compare.md"):
        text = Page((tmp_path / "out" / file).read_text()).text
        assert "1 run side by side" in text
        assert text.count("A run is left out: ") == 1
        assert "config.json is not valid JSON" in text
    assert "is not valid JSON" in line_of(compare(runs["lcd"]))


def test_a_mistyped_run_is_an_error_also_beside_others(runs, compare, tmp_path):
    assert "is no run (no config.json)" in line_of(compare(*runs.values(), tmp_path / "typo"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_evaluation_does_not_hide_the_rest_of_its_run(runs):
    (runs["lcd"] / "evaluation.json").write_text("[1")
    page = Page(html_of(list(runs.values())))
    assert len(page.curves("loss")) == 2
    assert page.text.count("evaluation.json is not valid JSON") == 1
    assert "No run has been evaluated" not in page.text


def test_a_folder_of_runs_is_told_with_the_command_for_them(runs, compare, tmp_path):
    (tmp_path / "runs" / "model").mkdir()
    (tmp_path / "runs" / "model" / "config.json").write_text("{}")  # of no training
    wanted = f"python -m infer compare {runs['lcd']} {runs['pcm']}\n"
    assert line_of(compare(tmp_path / "runs")).endswith(wanted)


@pytest.mark.parametrize("content", [b"\x00\xff\x12", b"\x00\n\xff\n", b'{"loss": 1.0}\n'])
def test_damaged_metrics_are_not_called_missing(runs, compare, content):
    (runs["lcd"] / "metrics.jsonl").write_bytes(content)
    error = line_of(compare(runs["lcd"]))
    assert "metrics.jsonl is damaged: none of its lines can be read; restore it" in error
    assert "yet" not in error


def test_a_finished_run_without_metrics_is_not_waited_for(made, runs, compare, tmp_path):
    whole = shutil.copytree(made["pcm"], tmp_path / "whole")
    (whole / "metrics.jsonl").unlink()
    error = line_of(compare(whole))
    assert "whole has trained 4 steps, but metrics.jsonl has no line of them" in error
    page = Page(html_of([runs["lcd"], whole]))
    assert page.text.count("4 of 4") == 2


def test_an_unknown_speed_is_no_time(runs):
    lines = [{"step": step, "loss": 1.0} for step in (2, 4)]
    write_lines(runs["lcd"] / "metrics.jsonl", lines)
    lead = Page(html_of([runs["lcd"]])).source.partition('<p class="lead">')[2].partition("<")[0]
    assert lead == "8 samples seen."
    assert "of training, and in 1 run of unknown speed." in Page(html_of(list(runs.values()))).text


def test_a_file_in_the_way_of_the_output(runs, cli, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output, why in (
        (".", "it is a file, where a folder"),
        ("below", "part of the path is a file"),
    ):
        output = tmp_path / "file" / output
        error = line_of(cli("infer", "compare", runs["lcd"], "--output", output))
        assert f"{output}: {why}" in error
    assert (tmp_path / "file").read_text() == "mine"


def test_code_in_a_remark_stays_code():
    assert prose("`a_b <c>` of x*y") == "`a_b <c>` of x\\*y"
    assert prose("one ` <b> ``c``") == "one \\` &lt;b> \\`\\`c\\`\\`"


def test_numbers_beyond_the_training_do_not_set_the_slider(runs):
    previews = runs["lcd"] / "previews"
    last = max(previews.iterdir())
    shutil.copy(last, previews / f"step-{'9' * 30}.png")
    (previews / "step-00000003.png").write_bytes(b"\x89PNG no more")
    page = Page(html_of(list(runs.values())))
    assert page.blocks["shown"]["steps"] == [2, 4]
    assert "previews of lcd that cannot be read (step 3)" in page.text
    assert f"previews of lcd beyond its training (step {'9' * 30})" in page.text
    assert json.dumps("9" * 30) not in page.source
