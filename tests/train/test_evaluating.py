"""Evaluation during training: what it notes and tells, and that it leaves the training as it is."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.cache.manifest import open_manifest
from shared.errors import UserError
from tests.support.evaluated import evaluations, holding_out, small
from tests.support.runs import metrics, tensors, train, untimed
from train.config import EvaluateConfig, SampleConfig
from train.evaluation import evaluate, teacher_results
from train.evaluation.artist import open_artist
from train.evaluation.heldout import load_heldout
from train.evaluation.score import decode_all
from train.measures.shapes import features
from train.trainer.loop import distill
from train.trainer.reporting import metrics as record
from train.trainer.reporting.evaluating import Evaluations, share_of
from train.trainer.setup import prepare

KEYS = [
    "step", "samples", "drawing_steps", "num_samples", "features", "fd", "accuracy", "seconds",
]  # fmt: skip
DROPOUT = {"lora_dropout": 0.3, "lr_scheduler": "cosine"}
MATCHING = {"objective": "dmd", "fake_updates": 2, "fake_warmup_steps": 1}


@pytest.fixture(scope="module")
def holding(tmp_path_factory, tiny_cache):
    """The tiny cache with 66 samples held out, and 6 to train on. Do not write into it."""
    return holding_out(tiny_cache, tmp_path_factory.mktemp("holding"), 66)


@pytest.fixture
def settings(tiny_sd, holding, tmp_path):
    return small(tiny_sd, holding, tmp_path)


def test_an_evaluation_is_noted_told_and_tracked(settings, capsys):
    config = settings(scorer="data.oracle:score", report_to=("tensorboard",))
    run = train(config)
    assert run.evaluations.noted == {2, 3}
    lines = evaluations(config.run)
    assert [list(line) for line in lines] == [KEYS] * 2
    assert [(line["step"], line["samples"]) for line in lines] == [(2, 4), (3, 6)]
    for line in lines:
        assert (line["drawing_steps"], line["num_samples"], line["features"]) == (1, 66, "shapes")
        assert line["fd"] > 0
        assert 0 <= line["accuracy"] <= 1
        assert line["accuracy"] * 66 == pytest.approx(round(line["accuracy"] * 66))
        assert line["seconds"] > 0
    [folder] = (config.run / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for name in ("fd", "accuracy"):
        told = [(event.step, event.value) for event in events.Scalars(f"evaluation/{name}")]
        assert told == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    said = capsys.readouterr().err
    for line in lines:
        figures = f"FD {line['fd']:.1f}, accuracy {line['accuracy']:.3f}"
        assert f"step {line['step']}: {figures} (66 held-out captions in 1 step, " in said
    assert "note: 66 pictures are few for 64 features" in said
    # A LoRA's step is five forwards, of two samples here; a picture is one.
    cost = r"every 2 steps an evaluation draws 66 held-out captions in 1 step: about (\d+)% of"
    assert int(re.search(cost, said)[1]) == pytest.approx(100 * 66 / (2 * 2 * 5), rel=0.1)


def test_without_evaluation_nothing_is_noted(settings):
    config = replace(settings(), evaluation_steps=0, num_eval_samples=640)
    assert train(config).evaluations is None
    assert not (config.run / "evaluations.jsonl").exists()


def test_the_last_figures_are_those_of_the_exported_student(settings):
    """Drawn all at once; the distance by NumPy and SciPy alone."""
    space = "train.measures.shapes:features"
    config = settings(student="full", evaluation_steps=5, max_train_steps=2, features=space)
    train(config)
    heldout = load_heldout(config.cache, open_manifest(config.cache), 66)
    artist = open_artist(config.run, SampleConfig(threads=1, device="cpu"))
    drawn = artist.for_shape(heldout.shape).draw("student", 1, heldout.texts, range(66))
    real, found = (features(decode_all(artist, one)) for one in (heldout.latents, drawn))
    covariances = [np.cov(rows.T) for rows in (real, found)]
    wanted = np.sum((real.mean(0) - found.mean(0)) ** 2)
    wanted += np.trace(sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    [line] = evaluations(config.run)
    assert line["fd"] == pytest.approx(wanted, rel=1e-6)
    assert line["features"] == space


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "within"), [("full", 1e-6), ("lora", 1e-5)])
def test_the_last_figures_are_those_of_train_evaluate(settings, monkeypatch, kind, within):
    """There a LoRA is merged into its teacher first, which rounds otherwise."""
    config = settings(student=kind, num_ddim_timesteps=2, scorer="data.oracle:score")
    train(replace(config, evaluation_steps=5))
    teacher = (("ddim", 2), ("ddim", 1))
    for module in (evaluate, teacher_results):
        monkeypatch.setattr(module, "REFERENCE", teacher[0])
    monkeypatch.setattr(teacher_results, "SOLVER_SAMPLINGS", teacher[1:])
    monkeypatch.setattr(teacher_results, "TEACHER_SAMPLINGS", teacher)
    monkeypatch.setattr(teacher_results, "TRIED", 5)
    monkeypatch.setattr(evaluate, "STUDENT_SAMPLINGS", (("student", 2),))
    flags = {"num_samples": 66, "scorer": config.scorer, "threads": 1}
    evaluate.evaluate(EvaluateConfig(run=config.run, device="cpu", **flags))
    stored = json.loads((config.run / "evaluation.json").read_text())
    [row] = [row for row in stored["rows"] if row["sampler"] == "student"]
    [line] = evaluations(config.run)
    assert (line["step"], line["drawing_steps"]) == (3, row["steps"])
    assert line["fd"] == pytest.approx(row["fd"], rel=within)
    assert line["accuracy"] == row["accuracy"]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"student": "lora", **DROPOUT}, id="lora"),
        pytest.param({"student": "full"}, id="full", marks=pytest.mark.slow),
        pytest.param(MATCHING, id="dmd", marks=pytest.mark.slow),
        pytest.param({"objective": "tcd"}, id="tcd", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_evaluated_trains_as_one_that_is_not(settings, flags):
    ends = []
    for name, every in (("plain", 0), ("evaluated", 2)):
        config = replace(settings(name, **flags), evaluation_steps=every)
        run = train(config)
        ends.append((tensors(config.run, 3), untimed(config.run), torch.get_rng_state()))
        assert run.student.unet.training
    (first, losses, rng), (second, same_losses, same_rng) = ends
    assert first.keys() == second.keys()
    assert len(first) > 50
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert losses == same_losses
    assert torch.equal(rng, same_rng)
    assert [line["step"] for line in evaluations(config.run)] == [2, 3]


@pytest.mark.slow
def test_its_time_is_not_the_steps(settings, monkeypatch):
    """A clock that evaluations advance by an hour, and steps by a second."""
    now = [0.0]
    run = prepare(settings(evaluation_steps=1, max_train_steps=2))
    monkeypatch.setattr(record.time, "perf_counter", lambda: now[0])

    def taking(seconds, work):
        def timed(*args, **options):
            now[0] += seconds
            return work(*args, **options)

        return timed

    run.student.after_step = taking(1.0, run.student.after_step)
    monkeypatch.setattr(Evaluations, "_rows_of", taking(3600.0, Evaluations._rows_of))
    distill(run)
    rates = [line["samples_per_second"] for line in metrics(run.config.run)]
    assert rates == pytest.approx([2.0] * 2)
    # The first looks at the real pictures, too.
    assert [line["seconds"] for line in evaluations(run.config.run)] == [7200, 3600]


# ---- What is refused before the first step.


def refusal(config) -> str:
    with pytest.raises(UserError) as error:
        prepare(config)
    assert not config.run.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_samples_that_are_not_there_are_refused(settings, tiny_cache, small_cache):
    said = refusal(settings(cache=tiny_cache))
    assert "has no samples held out of training; pass --eval-cache" in said
    assert f"python -m prep finish --cache {tiny_cache} --holdout 1000" in said
    said = refusal(settings(num_eval_samples=67))
    assert said.startswith("--num-eval-samples 67: ")
    assert "66 samples of its most frequent size to evaluate on; give 66" in said
    said = refusal(settings(eval_cache=small_cache))
    assert "24 samples of its most frequent size to evaluate on; give an --eval-cache with" in said


@pytest.mark.slow
def test_another_cache_may_hold_the_pictures(settings, tiny_cache, tiny_xl_cache):
    config = settings(cache=tiny_cache, eval_cache=tiny_cache, num_eval_samples=72)
    run = prepare(config)
    assert run.evaluations.num_samples == len(run.evaluations.heldout) == 72
    said = refusal(settings("other", eval_cache=tiny_xl_cache))
    assert "tiny-xl" in said


def test_a_scorer_and_a_vae_that_are_none_are_refused(settings, tiny_sd, tmp_path, monkeypatch):
    assert "--scorer nowhere:score" in refusal(settings(scorer="nowhere:score"))
    (tmp_path / "one_number.py").write_text("def score(images, captions):\n    return 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "--scorer one_number:score: 2 pictures" in refusal(settings(scorer="one_number:score"))
    shutil.copytree(tiny_sd, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "vae")
    assert "vae" in refusal(settings(model=str(tmp_path / "bare"))).lower()
    shutil.copytree(tiny_sd, tmp_path / "other")
    [weights] = (tmp_path / "other" / "vae").glob("*.safetensors")
    found = load_file(weights)
    save_file({name: 2 * tensor for name, tensor in found.items()}, weights, {"format": "pt"})
    said = refusal(settings(vae=str(tmp_path / "other")))
    assert "was encoded by another VAE" in said


# ---- Shares.


@pytest.mark.parametrize("count", [65, 66, 640, 641])
@pytest.mark.parametrize("world", [1, 2, 3, 8, 100])
def test_the_processes_draw_as_many_captions_each_and_together_all(count, world):
    shares = [share_of(count, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-count // world)}
    assert {number for share in shares for number in share} == set(range(count))
