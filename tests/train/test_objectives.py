"""Every objective that makes a few-step student, from flags to a picture by stock diffusers."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, TCDScheduler
from PIL import Image

from tests.support.exports import Run, assert_same_picture, draw_ours, make_run
from tests.support.runs import KINDS, tensors, train, untimed
from train.config import DistillConfig
from train.evaluation.evaluate import student_samplings
from train.trainer.loop import distill
from train.trainer.setup import prepare

SCHEDULERS = {"pcm": TCDScheduler, "tcd": TCDScheduler, "lcf": LCMScheduler}
FLAGS = {"pcm": {"num_phases": 2}, "tcd": {"target_steps": (4, 8)}, "lcf": {}}
FAMILIES = {"sd": ("tiny_cache", "tiny_sd"), "xl": ("tiny_xl_cache", "tiny_xl")}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# ---- Runs.


KILLED = [("tcd", "lora"), ("pcm", "full")]
SLOWER = [(o, k) for o in SCHEDULERS for k in KINDS if (o, k) not in KILLED]


@pytest.mark.parametrize(
    ("objective", "kind"), [*KILLED, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOWER)]
)
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    tiny_cache, tiny_sd, tmp_path, objective, kind, capsys
):
    def settings(name: str) -> DistillConfig:
        own = {"lora_rank": 4, "lora_dropout": 0.3} if kind == "lora" else {"ema_decay": 0.7}
        return DistillConfig(
            model=str(tiny_sd), cache=tiny_cache, run=tmp_path / name, threads=1, student=kind,
            objective=objective, train_batch_size=4, max_train_steps=4, checkpointing_steps=2,
            logging_steps=1, validation_steps=0, learning_rate=1e-3, report_to=(),
            **FLAGS[objective], **own,
        )  # fmt: skip

    train(settings("whole"))
    run = prepare(settings("killed"))
    record = run.recorder.record

    def die(step, *values):
        if step == 3:
            raise KeyboardInterrupt
        return record(step, *values)

    run.recorder.record = die
    with pytest.raises(KeyboardInterrupt):
        distill(run)
    capsys.readouterr()
    train(settings("killed"))
    assert "step-00000002" in capsys.readouterr().err
    first, second = (tensors(tmp_path / name, 4) for name in ("whole", "killed"))
    assert first.keys() == second.keys()
    assert len(first) > 100
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "killed")


# ---- Exports.


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    made: dict[tuple[str, str, str], Run] = {}

    def run(objective: str, family: str, kind: str) -> Run:
        if (objective, family, kind) not in made:
            cache, model = map(request.getfixturevalue, FAMILIES[family])
            folder = tmp_path_factory.mktemp(f"{objective}-{family}-{kind}")
            flags = {"objective": objective, **FLAGS[objective]}
            made[objective, family, kind] = make_run(folder, cache, model, family, kind, **flags)
        return made[objective, family, kind]

    return run


def draw_exported(run: Run, objective: str, steps: int, seed: int, **more) -> np.ndarray:
    """By diffusers alone, with the scheduler of the export."""
    pipe = run.student
    pipe.scheduler = SCHEDULERS[objective].from_pretrained(run.folder, subfolder="scheduler")
    answer = pipe(
        run.prompt, num_inference_steps=steps, guidance_scale=1.0 if run.kind == "lora" else 4.0,
        output_type="np", generator=torch.Generator().manual_seed(seed), height=64, width=64,
        **more,
    )  # fmt: skip
    return (answer.images[0] * 255).round().astype(int)


# All on tiny-xl: on tiny-sd two are killed above, and docs/objectives.md trains the third.
CASES = [("pcm", "xl", "lora"), ("tcd", "xl", "full"), ("lcf", "xl", "lora")]
OTHERS = [(o, f, k) for o in SCHEDULERS for f in FAMILIES for k in KINDS]
ALL = [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in OTHERS if c not in CASES)]


@pytest.mark.parametrize(("objective", "family", "kind"), ALL)
def test_stock_diffusers_draws_what_train_sample_draws(
    runs, cli, tmp_path, objective, family, kind
):
    run = runs(objective, family, kind)
    scale = () if kind == "lora" else ("--guidance-scale", 4)
    for steps, seed in ((4, 0), (1, 3)):
        words = ("--steps", steps, "--seed", seed, *scale)
        ours = draw_ours(cli, run, tmp_path, *words)
        assert_same_picture(ours, draw_exported(run, objective, steps, seed))
    noisy = draw_exported(run, objective, 4, 0, eta=0.7)
    if objective == "lcf":
        answer = cli("train", "sample", "--run", run.folder, "--eta", 0.7)
        assert answer.status == 1
        assert answer.err.splitlines()[-1].startswith("error: --eta 0.7 means nothing to LCMSched")
        return
    ours = draw_ours(cli, run, tmp_path, "--steps", 4, "--seed", 0, "--eta", 0.7, *scale)
    assert_same_picture(ours, noisy)
    assert np.abs(noisy - draw_exported(run, objective, 4, 0)).mean() > 1


@pytest.mark.parametrize(("objective", "family", "kind"), CASES)
def test_the_card_says_how(runs, objective, family, kind, tmp_path, monkeypatch):
    """Its lines run as they stand."""
    run = runs(objective, family, kind)
    card = (run.folder / "README.md").read_text()
    scheduler = SCHEDULERS[objective].__name__
    assert f"scheduler = {scheduler}.from_pretrained(" in card
    stored = json.loads((run.folder / "scheduler/scheduler_config.json").read_text())
    assert (stored["_class_name"], stored["original_inference_steps"]) == (scheduler, 50)
    assert ("`eta`, from 0 to 1, adds some" in card) == (objective != "lcf")
    assert ("w between" in card) == ((objective, kind) == ("pcm", "lora"))
    assert ("| num_phases | 2 |" in card) == (objective == "pcm")
    assert ("| target_steps | 4 8 |" in card) == (objective == "tcd")
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert np.asarray(Image.open(Path("picture.png"))).shape == (64, 64, 3)


@pytest.mark.parametrize("objective", [*SCHEDULERS, "lcd"])
def test_evaluate_draws_in_no_more_steps_than_the_solver_has(objective):
    def steps(solver: int) -> list[int]:
        config = DistillConfig(objective=objective, num_ddim_timesteps=solver)
        artist = SimpleNamespace(config=config, scheduler_config={})
        return [count for _, count in student_samplings(artist)]

    assert (steps(50), steps(4), steps(1)) == ([1, 2, 4, 8], [1, 2, 4], [1])
