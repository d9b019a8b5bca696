"""`train evaluate` by other measures: what it writes, and what older versions had written."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from tests.support.comparison import TEACHER, evaluated_runs, few_rows
from train.config import EvaluateConfig
from train.evaluation import evaluate


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_cache, tiny_sd):
    """A run, evaluated, and the cache that it was evaluated on."""
    runs, held = evaluated_runs(tmp_path_factory, tiny_sd, tiny_cache)
    return runs["consistency"], held


@pytest.fixture
def own(evaluated, tmp_path, monkeypatch):
    few_rows(monkeypatch, student=(1,))
    return tuple(shutil.copytree(one, tmp_path / one.name) for one in evaluated)


def assess(run, held, **more) -> dict:
    flags = {"num_samples": 65, "threads": 1, "device": "cpu"} | more
    evaluate.evaluate(EvaluateConfig(run=run, eval_cache=held, **flags))
    return json.loads((run / "evaluation.json").read_text())


def figures(rows) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "ms_per_image"} for row in rows]


def test_every_figure_has_its_interval(evaluated):
    run, _ = evaluated
    found = json.loads((run / "evaluation.json").read_text())
    for row in found["rows"]:
        wanted = {"fd", "high_frequency"} | ({"latent_mse"} if row["steps"] == 1 else set())
        assert set(row["intervals"]) == wanted
        assert row["fd_bias"] > 0
        for name, (low, high) in row["intervals"].items():
            assert low <= row[name] <= high
            assert low < high or (name, row["steps"]) == ("high_frequency", 3)
    lines = (run / "evaluation.md").read_text().splitlines()
    row = found["rows"][-1]
    low, high = row["intervals"]["fd"]
    cells = [cell.strip() for cell in lines[1 + len(found["rows"])].strip("|").split("|")]
    assert cells[2] == f"{row['fd']:.1f} ±{max(row['fd'] - low, high - row['fd']):.1f}"
    assert (found["features"], found["fd_title"]) == ("shapes", "FD")
    assert (found["features_weights"], found["num_features"]) == (None, 64)
    assert "above that of endlessly many pictures" in (run / "evaluation.md").read_text()


def test_rows_that_an_older_version_kept_are_taken_over(own, capsys):
    """They have no intervals, and the pictures' features are measured anew."""
    run, held = own
    before = json.loads((run / "evaluation.json").read_text())
    del before["rows"][-1]  # the student's of two steps, which is not drawn again
    (kept,) = (held / "evaluations").glob("*.safetensors")
    tensors = load_file(kept)
    real = tensors["real"].double().numpy()
    share = tensors["energies"].sum(0)
    old = {"mean": torch.from_numpy(real.mean(0)), "solution": tensors["solution"]}
    save_file(old | {"covariance": torch.from_numpy(np.cov(real.T))}, kept)
    new = ("intervals", "fd_bias", "precision", "recall")
    table = kept.with_suffix(".json")
    rows = json.loads(table.read_text())["rows"]
    rows = [{name: value for name, value in row.items() if name not in new} for row in rows]
    table.write_text(json.dumps({"sharpness": float(share[0] / share[1]), "rows": rows}))
    capsys.readouterr()
    after = assess(run, held)
    assert "have no intervals; delete" in capsys.readouterr().err
    assert [row["intervals"] for row in after["rows"][:-1]] == [{}] * len(TEACHER)
    for one, other in zip(after["rows"], before["rows"], strict=True):
        assert one["fd"] == pytest.approx(other["fd"], rel=1e-6)
    for name, interval in before["rows"][-1]["intervals"].items():
        assert after["rows"][-1]["intervals"][name] == pytest.approx(interval, rel=1e-6)


def test_mistakes_are_told_before_anything_is_drawn(own, tmp_path, monkeypatch):
    """A function that gives something else or fails, and an output that is none."""
    run, held = own
    (tmp_path / "mistaken.py").write_text(
        "def nan(images, captions): return [float('nan')] * len(images)\n"
        "def fails(images): raise KeyError('weights')\n"
        "def ends(images): raise SystemExit(3)\n"
        "def words(images): return [['a']] * len(images)\n"
        "def nothing(images): return [[]] * len(images)\n"
    )
    (tmp_path / "file").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(evaluate, "teacher_reference", None)  # what draws
    for flags, said in (
        ({"scorer": "mistaken:nan"}, "--scorer mistaken:nan: not all scores are finite"),
        (
            {"features": "mistaken:fails"},
            "--features mistaken:fails: KeyError: 'weights' (.*line 2",
        ),
        ({"features": "mistaken:ends"}, "--features mistaken:ends: SystemExit: 3 (.*line 3"),
        ({"features": "mistaken:words"}, "--features mistaken:words: it gave no array of numbers"),
        ({"features": "mistaken:nothing"}, "features are [N, D], a row for each picture"),
        ({"output": tmp_path / "file"}, "file: it is a file, where a folder belongs"),
    ):
        pattern = re.escape(said).replace(r"\.\*", ".*")
        with pytest.raises(UserError, match=pattern) as raised:
            assess(run, held, **flags)
        assert "\n" not in str(raised.value)


def test_measures_of_ones_own_precision_and_copies(own, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_measures.py").write_text(
        "def colours(images):\n"
        "    return images.mean((1, 2))\n"
        "def bright(images, captions):\n"
        "    return (images.mean((1, 2, 3)) > 128).astype(float)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    few_rows(monkeypatch, TEACHER[:2], (1,))
    run, held = own
    asked = {"features": "own_measures:colours", "scorer": "own_measures:bright",
             "precision_recall": True, "nearest_samples": 2}  # fmt: skip
    found = assess(run, held, **asked)
    assert (found["features"], found["scorer"]) == ("own_measures:colours", "own_measures:bright")
    assert found["fd_note"] is None  # 65 are many for 3 features
    for row in found["rows"]:
        assert {"precision", "recall", "accuracy"} <= set(row["intervals"])
        assert 0 <= row["precision"] <= 1
    text = (run / "evaluation.md").read_text()
    titles = [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]
    assert titles[2:6] == ["FD", "precision", "recall", "accuracy"]
    assert found["nearest"]["searched"] == 72
    assert found["nearest"]["ratio"] is None  # these held-out pictures are those of the training
    assert "nothing can be told" in text
    assert (run / "evaluation-nearest.png").is_file()
    assert str(run / "evaluation-nearest.png") in capsys.readouterr().out
    # The next evaluation, without the flag, leaves no sheet of another one.
    again = assess(run, held, **asked | {"nearest_samples": 0})
    assert figures(again["rows"]) == figures(found["rows"])
    assert again["nearest"] is None
    assert not (run / "evaluation-nearest.png").exists()
