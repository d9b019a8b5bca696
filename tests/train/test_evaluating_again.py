"""Runs that are evaluated and stop, are killed, go on, or have several processes."""

import os
import signal
import sys
from dataclasses import replace

import pytest
import torch

from shared.errors import UserError
from tests.support.calls import KILLED, forked
from tests.support.evaluated import evaluations, holding_out, small, timeless
from tests.support.launched import FSDP, TWO, launcher
from tests.support.runs import names, tensors, train, untimed
from train.state.checkpoint import latest_checkpoint
from train.trainer.reporting import evaluating


@pytest.fixture(scope="module")
def holding(tmp_path_factory, tiny_cache):
    """The tiny cache with 66 samples held out, and 6 to train on. Do not write into it."""
    return holding_out(tiny_cache, tmp_path_factory.mktemp("holding"), 66)


@pytest.fixture
def settings(tiny_sd, holding, tmp_path):
    return small(tiny_sd, holding, tmp_path)


def assert_same_run(a, b) -> None:
    first, second = tensors(a, 3), tensors(b, 3)
    assert first.keys() == second.keys()
    assert len(first) > 50
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert untimed(a) == untimed(b)
    assert timeless(a) == timeless(b)


def in_measurement(monkeypatch, number: int, act) -> None:
    """Let something happen when so many portions of pictures have been measured."""
    real, seen = evaluating.measured, []

    def disturbed(*args):
        found = real(*args)
        seen.append(found)
        if len(seen) == number:
            act()
        return found

    monkeypatch.setattr(evaluating, "measured", disturbed)
    monkeypatch.setattr(evaluating, "most_at_once", lambda shape: 22)  # three portions of 66


# Two pictures are tried, the real ones take portions 2 to 4, those of step 2 take 5 to 7.
MIDDLE_OF_STEP_2, MIDDLE_OF_STEP_3 = 6, 9


@pytest.fixture(scope="module")
def whole(tiny_sd, holding, tmp_path_factory):
    """An undisturbed run with portions of the same size. Do not write into it."""
    with pytest.MonkeyPatch.context() as patch:
        in_measurement(patch, 1000, None)
        config = small(tiny_sd, holding, tmp_path_factory.mktemp("whole"))()
        train(config)
    return config.run


@pytest.mark.parametrize(
    "moment", [MIDDLE_OF_STEP_2, pytest.param(MIDDLE_OF_STEP_3, marks=pytest.mark.slow)]
)
def test_killed_in_an_evaluation_a_run_ends_with_the_same_bits(
    settings, whole, monkeypatch, tmp_path, moment
):
    config = settings()
    with monkeypatch.context() as patch:
        in_measurement(patch, moment, lambda: os._exit(KILLED))
        assert forked(lambda: train(config), tmp_path / "log") == KILLED
    step = 2 if moment == MIDDLE_OF_STEP_2 else 3
    assert names(config.run)[-1] == f"step-0000000{step}"  # what it might cost was saved before
    log = config.run / "evaluations.jsonl"
    if log.exists():  # and a kill while a line is written leaves a part of it
        log.write_text(log.read_text() + '{"step": 3, "sam')
    in_measurement(monkeypatch, 1000, None)
    train(config)
    assert_same_run(config.run, whole)
    assert [line["step"] for line in evaluations(config.run)] == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [MIDDLE_OF_STEP_2, MIDDLE_OF_STEP_3])
def test_sigterm_ends_an_evaluation_and_the_resumed_run_begins_with_it(
    settings, whole, monkeypatch, capsys, moment
):
    config = settings(checkpointing_steps=0)
    with monkeypatch.context() as patch:
        in_measurement(patch, moment, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(config)
    step = 2 if moment == MIDDLE_OF_STEP_2 else 3
    assert f"stopped after step {step}; the same command goes on" in capsys.readouterr().err
    assert names(config.run) == [f"step-0000000{step}"]
    assert not (config.run / "pytorch_lora_weights.safetensors").exists()
    in_measurement(monkeypatch, 1000, None)
    train(config)
    assert timeless(config.run) == timeless(whole)
    assert (config.run / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("saved_every", [pytest.param(1, marks=pytest.mark.slow), 100])
def test_a_measure_that_fails_costs_no_training(settings, monkeypatch, tmp_path, saved_every):
    """Whether or not a checkpoint was due at that step, too."""
    (tmp_path / "of_mine.py").write_text(
        "calls = []\n"
        "def score(images, captions):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 2:\n"  # the two that are tried, the first evaluation
        "        raise ValueError('no more')\n"
        "    return [0.5] * len(images)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "of_mine", raising=False)
    config = settings(scorer="of_mine:score", checkpointing_steps=saved_every, evaluation_steps=1)
    with pytest.raises(UserError, match=r"^--scorer of_mine:score: ValueError: no more .*line 5"):
        train(config)
    assert latest_checkpoint(config.run).name == "step-00000002"
    assert [one["step"] for one in evaluations(config.run)] == [1]


@pytest.mark.slow
def test_a_run_may_be_evaluated_otherwise_when_it_goes_on(settings, tiny_cache):
    """And what was noted of an abandoned attempt is gone."""
    first = settings(evaluation_steps=1, checkpointing_steps=1, max_train_steps=2)
    train(first)
    lines = timeless(first.run)
    assert [line["step"] for line in lines] == [1, 2]
    others = {"eval_cache": tiny_cache, "num_eval_samples": 70, "scorer": "data.oracle:score"}
    train(replace(first, resume_from_checkpoint="step-1", **others))
    again = timeless(first.run)
    assert [line["step"] for line in again] == [1, 2]
    assert again[0] == lines[0]
    assert [line["num_samples"] for line in again] == [66, 70]
    # Without any it goes on as well.
    train(replace(first, evaluation_steps=0, resume_from_checkpoint="step-1"))
    assert timeless(first.run) == again[:1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "environment"),
    [
        pytest.param("lora", None, id="ddp"),
        pytest.param("full", FSDP, id="fsdp"),
        pytest.param("full", None, id="ddp-full"),
        pytest.param("lora", FSDP, id="fsdp-lora"),
    ],
)
def test_two_processes_find_the_figures_of_one(repo, tmp_path, tiny_sd, holding, kind, environment):
    """Of weights that do not move: what training rounds on two processes is another matter."""
    launch = launcher(repo, tmp_path, tiny_sd, holding)
    flags = {
        "student": kind, "evaluation_steps": 2, "num_eval_samples": 65, "num_ddim_timesteps": 1,
        "scorer": "data.oracle:score", "learning_rate": 1e-20,
        "lora_rank": 4 if kind == "lora" else None,
    }  # fmt: skip
    [alone] = timeless(launch("one", 1, **flags))
    [shared] = timeless(launch("two", 2, environment, **flags | TWO))
    assert shared["fd"] == pytest.approx(alone["fd"], rel=1e-5)
    assert shared | {"fd": 0} == alone | {"fd": 0}
