"""`train compare`: its figures are the evaluations', its columns the students' own drawings."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from shared.cache.manifest import open_manifest
from shared.models.vae import decode_latents
from tests.support.comparison import TEACHER, assess, copied, evaluated_runs, few_rows
from tests.support.runs import metrics
from train.comparison.summary import training_seconds
from train.config import SampleConfig
from train.evaluation.artist import open_artist
from train.evaluation.heldout import load_heldout
from train.state.checkpoint import TrainingState


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory, tiny_cache, tiny_sd):
    return evaluated_runs(tmp_path_factory, tiny_sd, tiny_cache)


@pytest.fixture
def runs(shared_runs):
    return shared_runs[0]


@pytest.fixture
def own(runs, tmp_path):
    return copied(runs, tmp_path / "own")


@pytest.fixture
def compare(cli, tmp_path, monkeypatch):
    few_rows(monkeypatch)

    def run(*words):
        return cli("train", "compare", *words, "--output", tmp_path / "out", "--threads", 1,
                   "--device", "cpu")  # fmt: skip

    return run


def test_the_figures_are_those_of_the_evaluations(runs, compare, tmp_path):
    answer = compare(*runs.values(), "--num-captions", 0)
    assert answer.status == 0, answer.err
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    evaluations = {
        name: json.loads((run / "evaluation.json").read_text()) for name, run in runs.items()
    }
    for told, (name, evaluation) in zip(found["runs"], evaluations.items(), strict=True):
        rows = evaluation["rows"]
        assert told["rows"] == [row for row in rows if row["sampler"] == "student"]
        assert told["name"] == name
        assert told["objective"] == {"consistency": "lcd", "trajectory": "tcd"}[name]
        assert told["student"] == {"consistency": "lora", "trajectory": "full"}[name]
        assert (told["training_steps"], told["samples_seen"]) == (3, 12)
        rates = [line["samples_per_second"] for line in metrics(runs[name])]
        assert told["training_seconds"] == pytest.approx(8 / rates[0] + 4 / rates[1])
        assert told["step_cost"] == 1  # both ask the teacher, and take as many forwards
    # The teacher's rows stand there once: that of most steps, then the better solver of each.
    (teacher,) = found["teachers"]
    assert teacher["runs"] == list(runs)
    rows = {(r["sampler"], r["steps"]): r for r in evaluations["consistency"]["rows"]}
    best = [min((r for r in rows.values() if r["sampler"] != "student" and r["steps"] == n),
                key=lambda r: r["fd"]) for n in (1, 2)]  # fmt: skip
    assert teacher["rows"] == [rows[TEACHER[0]], *best]
    assert not (tmp_path / "out" / "compare.png").exists()


def test_the_best_figure_of_each_number_of_steps_is_bold(runs, compare, tmp_path):
    answer = compare(*runs.values(), "--num-captions", 0)
    text = (tmp_path / "out" / "compare.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith("| ")]  # fmt: skip
    heads, *lines = lines
    assert heads[:5] == ["run", "objective", "student", "steps", "FD"]
    table = {(line[0], line[3]): line for line in lines}
    assert {line[0] for line in lines} == {"teacher", *runs}
    for steps in ("1", "2"):
        cells = [table[name, steps][4].split()[0] for name in runs]  # then ±, half the interval
        values = [float(cell.strip("*")) for cell in cells]
        marked = [cell.startswith("**") and cell.endswith("**") for cell in cells]
        assert marked == [value == min(values) for value in values]
    assert "**" not in "".join(table["teacher", "1"])
    printed = answer.out.replace(" ", "")
    assert text.split("\n\n")[0].replace("*", "").replace(" ", "").replace("-", "") in (
        printed.replace("-", "")
    )
    assert "*" not in printed


def test_each_column_is_what_that_student_draws(runs, shared_runs, compare, tmp_path, tiny_sd):
    answer = compare(*runs.values(), "--num-captions", 2, "--steps", 2, "--seed", 7)
    assert answer.status == 0, answer.err
    sheet = np.asarray(Image.open(tmp_path / "out" / "compare.png"))
    heldout = load_heldout(shared_runs[1], open_manifest(shared_runs[1]), 65)
    for column, name in enumerate([None, *runs]):
        artist = open_artist(runs[name or "consistency"], SampleConfig(threads=1, device="cpu"))
        artist = artist.with_teacher(heldout.empty).for_shape(heldout.shape)
        what = ("student", 2) if name else TEACHER[0]
        wanted = [artist.draw(*what, heldout.texts[[row]], [7 + row]) for row in (0, 1)]
        latents = torch.cat(wanted) / artist.vae.config.scaling_factor
        for row, picture in enumerate(decode_latents(artist.vae, latents)):
            top, left = 34 + row * (128 + 22), 4 + column * (128 + 4)
            tile = sheet[top : top + 128, left : left + 128].astype(int)
            assert np.array_equal(tile[::2, ::2], tile[1::2, 1::2])  # enlarged
            assert np.abs(tile[::2, ::2] - picture).max() <= 1  # drawn in another batch


def spoil(run, **changes):
    path = run / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_conditions_are_named_with_both_sides(own, compare):
    for changes, said in [
        ({"heldout": "0" * 16, "eval_cache": "caches/other"}, "on other pictures"),
        ({"guidance_scale": 5.0}, "guidance_scale"),
        ({"seed": 3}, "seed"),
        ({"scorer": "a:b"}, "scorer"),
        ({"features": "inception"}, "features"),
    ]:
        before = (own["trajectory"] / "evaluation.json").read_text()
        spoil(own["trajectory"], **changes)
        answer = compare(*own.values())
        assert answer.status == 1
        assert answer.err.count("\n") == 1
        assert said in answer.err
        assert str(own["consistency"]) in answer.err
        assert str(own["trajectory"]) in answer.err
        assert all(str(value) in answer.err for name, value in changes.items() if name != "heldout")
        (own["trajectory"] / "evaluation.json").write_text(before)


def test_an_older_evaluation_still_goes_with_a_new_one(own, compare, tmp_path):
    """It calls the features otherwise, and has neither weights nor intervals."""
    path = own["trajectory"] / "evaluation.json"
    kept = json.loads(path.read_text())
    for name in ("features_weights", "scorer_weights", "features_source", "scorer_source",
                 "fd_title", "scorer_title", "nearest"):  # fmt: skip
        del kept[name]
    for row in kept["rows"]:
        for name in ("intervals", "fd_bias", "precision", "recall"):
            del row[name]
    path.write_text(json.dumps(kept | {"features": "thumb48-edges16-percent"}))
    answer = compare(*own.values(), "--num-captions", 0)
    assert answer.status == 0, answer.err
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["conditions"]["features"] == "shapes"
    cells = {line.split("|")[1].strip(): line for line in answer.out.splitlines() if "|" in line}
    assert "±" in cells["consistency"]
    assert "±" not in cells["trajectory"]


def test_other_weights_are_other_conditions(own, compare):
    for run, weights in zip(own.values(), ("a" * 16, "b" * 16), strict=True):
        spoil(run, features="dinov2", features_weights=weights, fd_title="FD-DINOv2")
    answer = compare(*own.values())
    assert answer.status == 1
    assert "features_weights aaaaaaaaaaaaaaaa" in answer.err
    spoil(own["trajectory"], features_weights="a" * 16)
    answer = compare(*own.values(), "--num-captions", 0)
    assert answer.status == 0, answer.err
    assert "FD-DINOv2" in answer.out.splitlines()[0]
    assert "FD-DINOv2: Fréchet distance in dinov2 features" in answer.out


def without(name):
    return lambda run: (run / name).unlink()


def older(run):
    path = run / "evaluation.json"
    kept = json.loads(path.read_text())
    del kept["heldout"], kept["teacher"]
    path.write_text(json.dumps(kept))


ALONE = [
    (without("evaluation.json"), "has not been evaluated"),
    (older, "older version's"),
    (lambda run: spoil(run, weights="f" * 16), "not the one that was evaluated"),
    (lambda run: spoil(run, rows=[{"sampler": "x"}]), "damaged"),
    (without("config.json"), "is no run"),
    (without("pytorch_lora_weights.safetensors"), "no exported student"),
]


@pytest.mark.parametrize(("change", "said"), ALONE, ids=[said for _, said in ALONE])
def test_a_run_that_cannot_be_compared(own, compare, change, said):
    change(own["consistency"])
    answer = compare(*own.values())
    assert answer.status == 1
    assert answer.err.count("\n") == 1
    assert said in answer.err
    assert str(own["consistency"]) in answer.err


def test_which_runs_and_flags_that_cannot_be(own, compare, tmp_path, tiny_cache):
    for words, status, said in [
        ([], 2, "which runs?"),
        ([*own.values(), "--steps", 51], 1, "knows 50 at most"),
        ([*own.values(), "--eval-cache", tmp_path], 1, "manifest.json"),
        (["--run", own["consistency"]], 2, "did you mean --runs?"),
    ]:
        answer = compare(*words)
        assert (answer.status, answer.err.count("\n")) == (status, 1), answer.err
        assert said in answer.err


def test_pictures_that_were_not_evaluated_are_not_drawn(own, compare, shared_runs):
    """Neither captions nor teacher are taken on trust."""
    for run in own.values():
        spoil(run, heldout="0" * 16)
    answer = compare(*own.values())
    assert answer.status == 1
    assert "holds other samples" in answer.err
    heldout = load_heldout(shared_runs[1], open_manifest(shared_runs[1]), 65)
    for run in own.values():
        spoil(run, heldout=heldout.digest(), teacher="0" * 32)
    answer = compare(*own.values(), "--num-captions", 1, "--steps", 1)
    assert answer.status == 1
    assert "is another than when it was evaluated" in answer.err


def test_two_teachers_have_a_line_each(own, compare, tmp_path):
    spoil(own["trajectory"], teacher="0" * 32)
    answer = compare("--runs", *own.values(), "--num-captions", 0)
    assert answer.status == 0, answer.err
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [one["runs"] for one in found["teachers"]] == [["consistency"], ["trajectory"]]
    assert "teacher of consistency" in answer.out
    assert "teacher of trajectory" in answer.out


def test_steps_behind_the_checkpoint_are_not_counted(tmp_path):
    rates = ((2, 4.0), (3, 2.0), (5, 1.0))
    lines = [json.dumps({"step": step, "samples_per_second": rate}) for step, rate in rates]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "sam')
    assert training_seconds(tmp_path, TrainingState(3, 12, 4, {})) == 2 * 4 / 4.0 + 4 / 2.0


def test_what_is_no_longer_told_is_a_dash(own, compare, tmp_path):
    run = own["consistency"]
    (run / "metrics.jsonl").write_text('{"step": 2}\n')
    assert training_seconds(run, TrainingState(3, 12, 4, {})) is None
    shutil.rmtree(own["trajectory"] / "checkpoints")
    answer = compare(*own.values(), "--num-captions", 0)
    assert answer.status == 0, answer.err
    told = json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]
    assert [one["training_seconds"] for one in told] == [None, None]
    assert [one["samples_seen"] for one in told] == [12, None]


@pytest.mark.slow
def test_an_evaluation_on_fewer_captions_is_another(own, shared_runs, compare, tmp_path):
    """As `evaluate` writes it."""
    held = shutil.copytree(shared_runs[1], tmp_path / "held")
    assess(own["trajectory"], held, num_samples=66)
    answer = compare(*own.values())
    assert answer.status == 1
    assert "on other pictures" in answer.err
