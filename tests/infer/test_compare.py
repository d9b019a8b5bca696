"""`infer compare`: what its page and its Markdown say of runs that may be unfinished."""

import base64
import hashlib
import json
import sys

import numpy as np
import pytest

from infer.compare.page import html_of
from tests.support.compared import (
    FEATURES,
    Page,
    copied,
    evaluations,
    write_lines,
)
from tests.support.runs import metrics

HOSTILE = "<img src=x onerror=\"document.title='owned'\">&amp;{{7*7}} \u202ex $$\\frac12$$ @y"


@pytest.fixture
def compare(cli, tmp_path):
    """Run the command; returns its answer, the page and the Markdown."""

    def run(*words):
        out = tmp_path / "out"
        answer = cli("infer", "compare", *words, "--output", out)
        assert answer.status == 0, answer.err
        return answer, Page((out / "index.html").read_text()), (out / "compare.md").read_text()

    return run


def settings(page):
    """Name and values in the table of what differs, and those that are folded away."""
    table = page.source.partition('<table class="settings">')[2].partition("</section>")[0]
    differing, _, folded = table.partition("<details>")
    return differing, folded


def test_it_writes_a_page_and_markdown_and_says_so(runs, compare, tmp_path):
    answer, page, tables = compare(*runs.values())
    size = (tmp_path / "out" / "index.html").stat().st_size / 1e6
    assert answer.out == f"{tmp_path}/out/index.html: 2 runs, up to step 4, {size:.1f} MB\n"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["compare.md", "index.html"]
    assert page.source.startswith("<!doctype html>")
    assert "2 runs side by side" in page.text
    assert tables.startswith("# 2 runs side by side\n")
    assert not [m for m in page.all("meta") if m.get("http-equiv") == "refresh"]


def test_what_differs_stands_side_by_side_and_the_rest_is_folded(runs, compare):
    _, page, tables = compare(*runs.values())
    differing, folded = settings(page)
    for name, one, other in (("--objective", "lcd", "pcm"), ("--learning-rate", "0.001", "0.002"),
                             ("--validation-steps", "2", "0")):  # fmt: skip
        row = f"<code>{name}</code></th><td>{one}</td><td>{other}</td>"
        assert row in differing
        assert f"<code>{name}</code>" not in folded
        assert any(line.split() == ["|", f"`{name}`", "|", one, "|", other, "|"]
                   for line in tables.splitlines())  # fmt: skip
    assert "<code>--lora-rank</code></dt><dd>2</dd>" in folded
    assert "--lora-rank" not in differing
    assert "<code>--run</code>" not in page.source  # where a run lies is its own
    assert "They differ in --objective, --learning-rate" in page.text


def test_the_points_of_curves_are_those_of_the_metrics(runs, compare):
    _, page, _ = compare(*runs.values())
    for curve, run in zip(page.curves("loss"), runs.values(), strict=True):
        lines = metrics(run)
        assert curve["y"].tolist() == [line["loss"] for line in lines]
        assert curve["step"].tolist() == curve["x"].tolist() == [1, 2, 3, 4]
        assert curve["sample"].tolist() == [2, 4, 6, 8] == [line["samples"] for line in lines]
        seconds = np.cumsum([2 / line["samples_per_second"] for line in lines])
        assert curve["hour"] == pytest.approx(seconds / 3600)
        # The average of few lines looks back on three of them.
        weights = np.array([(1 / 3) * (2 / 3) ** age for age in range(4)])
        losses = np.array([line["loss"] for line in lines])
        wanted = [weights[:n] @ losses[:n][::-1] / weights[:n].sum() for n in range(1, 5)]
        assert curve["smooth"] == pytest.approx(wanted)


def test_runs_of_older_versions_are_counted_by_steps(runs, compare):
    lines = [{"step": 10, "loss": 1.0, "samples_per_second": 4.0},
             {"step": 30, "fake_loss": 3.0, "samples_per_second": 8.0}]  # fmt: skip
    write_lines(runs["lcd"] / "metrics.jsonl", lines)
    _, page, _ = compare(runs["lcd"])
    assert page.curves("loss")[0]["sample"].tolist() == [20]
    (fake,) = page.curves("fake_loss")
    assert (fake["step"].tolist(), fake["sample"].tolist()) == ([30], [60])
    assert fake["hour"] == pytest.approx([(20 / 4 + 40 / 8) / 3600])
    assert "Loss of the fake network" in page.text


def test_evaluations_while_a_run_trained_are_curves(runs, compare):
    evaluations(runs["lcd"], (2, 90.5, 0.5), (4, 70.25, 0.75))
    evaluations(runs["pcm"], (3, 80.0, None))
    evaluations(runs["pcm"], (4, 60.0, None), num_samples=256)
    _, page, tables = compare(*runs.values())
    first, second = page.curves("fd-0")
    assert (first["step"].tolist(), first["y"].tolist()) == ([2, 4], [90.5, 70.25])
    assert (second["step"].tolist(), second["y"].tolist()) == ([3], [80.0])
    seconds = np.cumsum([2 / line["samples_per_second"] for line in metrics(runs["lcd"])])
    assert first["hour"] == pytest.approx(seconds[[1, 3]] / 3600)
    assert page.curves("accuracy-0")[0]["y"].tolist() == [0.5, 0.75]
    assert page.curves("fd-1")[0]["y"].tolist() == [60.0]  # of other captions: a chart of its own
    assert f"FD: {FEATURES} features, 64 captions" in page.text
    assert "Accuracy: 64 captions" in page.text
    assert "losses of different objectives measure different things" in page.text
    assert "No run was evaluated while it trained" not in page.text
    assert any(line.split("|")[1:4:2] and "70.25" in line and "lcd in 4 steps" in line
               for line in tables.splitlines())  # fmt: skip


def test_without_such_evaluations_the_page_says_how_to_have_them(runs, compare):
    _, page, _ = compare(runs["lcd"])
    assert "train distill --evaluation-steps does that" in page.text
    assert list(page.blocks["items"]) == ["loss"]


def test_cost(runs, compare):
    _, page, tables = compare(runs["lcd"])
    lines = metrics(runs["lcd"])
    seconds = sum(2 / line["samples_per_second"] for line in lines)
    assert f"{8 / seconds:,.0f} samples/s" in page.text or f"{8 / seconds:.1f} samp" in page.text
    peak = max(line["peak_process_memory_bytes"] for line in lines)
    wanted = f"{peak / 1e9:.1f} GB (process)" if peak >= 1e9 else f"{peak / 1e6:.1f} MB (process)"
    assert wanted in page.text
    assert wanted in tables
    assert "4 of 4" in page.text
    assert "finished" in page.text


def test_an_unfinished_run_and_one_without_metrics_are_shown(runs, compare):
    (runs["pcm"] / "metrics.jsonl").unlink()
    with (runs["lcd"] / "metrics.jsonl").open("a") as file:
        file.write('not json\n{"step": 5, "loss"')  # the last is being written
    config = json.loads((runs["lcd"] / "config.json").read_text()) | {"max_train_steps": 9}
    (runs["lcd"] / "config.json").write_text(json.dumps(config))
    _, page, _ = compare(*runs.values())
    assert "4 of 9" in page.text
    assert page.text.count("unfinished") == 2
    assert "lcd : 1 damaged line of metrics.jsonl is left out" in page.text
    assert len(page.curves("loss")) == 1


def test_names_and_prompts_of_others_are_text(runs, compare, tmp_path):
    hostile = copied(runs["lcd"], tmp_path / "runs" / HOSTILE.replace("/", "|"))
    config = json.loads((hostile / "config.json").read_text())
    config["vae"] = "</script><script>alert(1)</script>"
    (hostile / "config.json").write_text(json.dumps(config))
    _, page, tables = compare(*runs.values(), hostile)
    assert "<img src=x onerror=\"document.title='owned'\">&amp;{{7*7}} [U+202E]x" in page.text
    assert "</script><script>alert(1)</script>" in page.text
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
    assert [script for script in page.all("script") if "src" in script] == []
    assert len(page.all("script")) == 4  # two of data, BokehJS, the page's own
    assert "\u202e" not in page.source + tables
    assert "<img" not in tables
    assert "<script" not in tables


def test_only_scripts_of_these_hashes_run_and_nothing_is_fetched(runs, compare):
    _, page, _ = compare(runs["lcd"])
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert (rules["default-src"], rules["img-src"]) == ("'none'", "data:")
    assert "connect-src" not in rules
    scripts = page.source.split("<script>")[1:]
    digests = [hashlib.sha256(s.partition("</script>")[0].encode()).digest() for s in scripts]
    wanted = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    assert rules["script-src"].split() == wanted
    assert page.all("link") == page.all("iframe") == []


def test_the_page_for_other_pages_is_the_same(runs):
    page = Page(html_of([runs["lcd"], runs["lcd"].parent / "." / "lcd"]))  # each run once
    assert "1 run side by side" in page.text
    assert len(page.curves("loss")) == 1


@pytest.mark.parametrize(
    ("spoil", "message", "status"),
    [
        (lambda runs: None, "is no run (no config.json)", 1),
        (lambda runs: (runs["lcd"] / "config.json").write_text("{"), "is not valid JSON", 1),
        (lambda runs: (runs["lcd"] / "metrics.jsonl").unlink(), "has no metrics yet: the first "
         "line comes after 1 step (--logging-steps); --watch waits for it", 1),
    ],
)  # fmt: skip
def test_mistakes_end_in_a_line(runs, cli, tmp_path, spoil, message, status):
    spoil(runs)
    run = tmp_path if message.startswith("is no run") else runs["lcd"]
    answer = cli("infer", "compare", run, "--output", tmp_path / "out")
    assert (answer.status, answer.out) == (status, "")
    assert message in answer.err
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_run_and_no_bokeh(runs, cli, monkeypatch, tmp_path):
    answer = cli("infer", "compare")
    assert answer.status == 2
    assert "which runs? For example: python -m infer compare runs/a runs/b" in answer.err
    monkeypatch.setitem(sys.modules, "bokeh", None)
    answer = cli("infer", "compare", runs["lcd"], "--output", tmp_path / "out")
    assert answer.status == 1
    assert "pip install 'latent-distillery[compare]'" in answer.err
    assert answer.err.count("\n") == 1
