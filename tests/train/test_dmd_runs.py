"""`--objective dmd` as it is trained, stopped, continued, exported and drawn."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from PIL import Image
from safetensors.torch import load_file

from shared.errors import UserError
from tests.support.exports import Run, assert_same_picture, draw_ours, make_run
from tests.support.runs import tensors, train, untimed
from train.config import DistillConfig
from train.state import checkpoint
from train.trainer.loop import distill
from train.trainer.setup import prepare

FAMILIES = {"sd": ("tiny_cache", "tiny_sd"), "xl": ("tiny_xl_cache", "tiny_xl")}
DMD = {"objective": "dmd", "fake_updates": 2, "fake_warmup_steps": 1}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def settings(tiny_cache, tiny_sd, tmp_path):
    """The flags of a small run; `settings(seed=1)` changes some."""

    def make(run: str = "run", **more) -> DistillConfig:
        flags = {
            "model": str(tiny_sd), "cache": tiny_cache, "run": tmp_path / run, "threads": 1,
            "train_batch_size": 4, "max_train_steps": 6, "checkpointing_steps": 1, "lora_rank": 4,
            "logging_steps": 1, "validation_steps": 0, "learning_rate": 1e-3, "report_to": (),
        }  # fmt: skip
        return DistillConfig(**flags | DMD | more)

    return make


# ---- Steps.


def test_both_learn_when_it_is_their_turn_and_are_logged_apart_or_by_their_means(settings):
    config = settings()
    train(config)
    lines = untimed(config.run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "loss" in line] == [3, 5]
    assert all(line["fake_loss"] > 0 and line["fake_grad_norm"] > 0 for line in lines)
    assert {line["fake_learning_rate"] for line in lines} == {4e-4}
    assert {line["learning_rate"] for line in lines if "loss" in line} == {1e-3}
    weights = [
        load_file(checkpoint.checkpoint_folder(config.run, step) / "networks.safetensors")
        for step in range(1, 7)
    ]
    for before, after, step in zip(weights, weights[1:], range(2, 7), strict=False):
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        assert {".fake." in name for name in moved} == ({True, False} if step in (3, 5) else {True})
    # A line of several steps has the means of those that were taken.
    some = settings("some", logging_steps=4, max_train_steps=4, checkpointing_steps=4)
    train(some)
    [line] = untimed(some.run)
    assert line["step"] == 4
    assert line["loss"] == lines[2]["loss"]
    losses = [line["fake_loss"] for line in lines[:4]]
    assert line["fake_loss"] == pytest.approx(sum(losses) / 4)


@pytest.mark.slow
def test_fp16_whose_student_overflows_takes_the_step_again(settings, monkeypatch):
    """The fake score has learned meanwhile; neither is counted before both have moved."""
    config = settings(mixed_precision="fp16", max_train_steps=3)
    run = prepare(config)
    loss, asked = type(run.objective).__call__, []

    def overflowing(objective, *rest):
        asked.append(1)
        return loss(objective, *rest) * (float("inf") if len(asked) == 1 else 1)

    monkeypatch.setattr(type(run.objective), "__call__", overflowing)
    distill(run)
    assert len(asked) == 2
    assert [line["step"] for line in untimed(config.run)] == [1, 2, 3]
    state = checkpoint.read_progress(checkpoint.checkpoint_folder(config.run, 3))
    assert (state.step, state.position, state.scaler["scale"]) == (3, 16, 2.0**15)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(config.run, 3).values())


# ---- Stopped and continued.

ROUGH = {
    "lora": {"gan_weight": 0.05, "num_student_steps": 2, "lora_dropout": 0.3},
    "full": {"student": "full", "gradient_accumulation_steps": 2, "train_batch_size": 2},
    "three": {"student": "full", "fake": "full", "gan_weight": 0.05, "lr_warmup_steps": 2},
}


def stop_at(config: DistillConfig, step: int) -> None:
    """Train until Ctrl-C in the middle of a step."""
    run = prepare(config)
    record = run.recorder.record

    def record_or_stop(number, *values):
        if number == step:
            raise KeyboardInterrupt
        return record(number, *values)

    run.recorder.record = record_or_stop
    with pytest.raises(KeyboardInterrupt):
        distill(run)


THRICE = (2, 3, 5)  # before the student has moved, in a step that moves it, and after one


@pytest.mark.parametrize(
    ("which", "stops"),
    [
        ("lora", (3,)),
        *(pytest.param(which, THRICE, marks=pytest.mark.slow) for which in ROUGH),
    ],
)
def test_a_run_that_was_stopped_is_the_uninterrupted_one(settings, which, stops):
    rough = {"lora_rank": 64} if which != "lora" else {}
    whole = settings("whole", **rough, **ROUGH[which])
    train(whole)
    parts = replace(whole, run=whole.run.parent / "parts")
    for step in stops:
        stop_at(parts, step)
    train(parts)
    first, second = tensors(whole.run, 6), tensors(parts.run, 6)
    assert first.keys() == second.keys()
    assert len(first) > 100
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert untimed(whole.run) == untimed(parts.run)


def test_a_checkpoint_that_lost_the_students_moments_is_refused(settings):
    """They may be absent before it has moved, and only then."""
    config = settings(max_train_steps=3)
    train(config)
    early, late = (checkpoint.checkpoint_folder(config.run, step) for step in (2, 3))
    longer = settings(max_train_steps=4, resume_from_checkpoint="latest")
    (late / "optimizer.safetensors").write_bytes((early / "optimizer.safetensors").read_bytes())
    state = json.loads((late / "state.json").read_text())
    state["files"]["optimizer.safetensors"] = (late / "optimizer.safetensors").stat().st_size
    (late / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"optimizer.safetensors lacks .*lora_A.default"):
        prepare(longer)


def test_the_terms_of_a_run_are_its_own_flags(settings):
    train(settings(max_train_steps=3))
    with pytest.raises(UserError, match=r"gan_weight is 0\.0 there, 0\.1 here"):
        prepare(settings(max_train_steps=3, gan_weight=0.1, resume_from_checkpoint="latest"))
    slower = {"learning_rate": 1e-5, "fake_learning_rate": 2e-5}  # a rate may change
    prepare(settings(max_train_steps=4, resume_from_checkpoint="latest", **slower))


def test_dmd_goes_on_from_lcd(settings):
    """The recipe: LCD first. The LoRA's own weights are where it begins."""
    lcd = settings("lcd", objective="lcd", max_train_steps=3)
    train(lcd)
    config = settings(init_student=lcd.run, learning_rate=1e-9)
    train(config)
    before, after = (load_file(run / "pytorch_lora_weights.safetensors") for run in
                     (lcd.run, config.run))  # fmt: skip
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=0)
    assert "started from `lcd`" in (config.run / "README.md").read_text()


# ---- Exports.


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    made: dict[tuple[str, str, int], Run] = {}

    def run(family: str, kind: str, steps: int) -> Run:
        if (family, kind, steps) not in made:
            cache, model = map(request.getfixturevalue, FAMILIES[family])
            folder = tmp_path_factory.mktemp(f"dmd-{family}-{kind}-{steps}")
            flags = {**DMD, "num_student_steps": steps, "gan_weight": 0.01}
            made[family, kind, steps] = make_run(folder, cache, model, family, kind, **flags)
        return made[family, kind, steps]

    return run


CASES = [("sd", "lora", 4), ("xl", "full", 3)]
OTHERS = [pytest.param(*c, marks=pytest.mark.slow) for c in [("xl", "lora", 1), ("sd", "full", 1)]]


@pytest.mark.parametrize(("family", "kind", "steps"), [*CASES, *OTHERS])
def test_stock_diffusers_draws_what_train_sample_draws(runs, cli, tmp_path, family, kind, steps):
    run = runs(family, kind, steps)
    pipe = run.student
    pipe.scheduler = LCMScheduler.from_pretrained(run.folder, subfolder="scheduler")
    answer = pipe(
        run.prompt, num_inference_steps=steps, guidance_scale=1.0, output_type="np",
        generator=torch.Generator().manual_seed(5), height=64, width=64,
    )  # fmt: skip
    assert pipe.scheduler.timesteps.tolist()[0] == {3: 998}.get(steps, 999)
    stock = (answer.images[0] * 255).round().astype(int)
    assert_same_picture(draw_ours(cli, run, tmp_path, "--seed", 5), stock)
    more = cli("train", "sample", "--run", run.folder, "--steps", steps + 1)
    assert more.err.splitlines()[-1].startswith(f"error: --steps {steps + 1} must be 1 to {steps}")
    told = cli("train", "sample", "--run", run.folder, "--guidance-scale", 3)
    assert "is drawn without guidance" in told.err


@pytest.mark.parametrize(("family", "kind", "steps"), CASES)
def test_the_card_says_how(runs, tmp_path, monkeypatch, family, kind, steps):
    """Its lines run as they stand; of the fake score nothing is exported."""
    run = runs(family, kind, steps)
    card = (run.folder / "README.md").read_text()
    assert f"num_inference_steps={steps}," in card
    assert "guidance_scale=1.0," in card
    assert "The guidance is built in" in card
    assert f"| num_student_steps | {steps} |" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert np.asarray(Image.open(Path("picture.png"))).shape == (64, 64, 3)
    files = [load_file(path) for path in run.folder.rglob("*.safetensors")
             if "checkpoints" not in path.parts]  # fmt: skip
    assert not any("fake" in name or "head" in name for file in files for name in file)


def test_the_teachers_answers_cannot_serve(cli, tiny_cache, tiny_sd, tmp_path):
    """What it is asked are pictures that nobody could know before."""
    words = ("train", "distill", "--model", tiny_sd, "--cache", tiny_cache, "--run", tmp_path / "r")
    answer = cli(*words, "--objective", "dmd", "--teacher", "online")
    assert answer.status == 2
    assert "--teacher is for --objective lcd" in answer.err
    assert "means nothing to --objective dmd; leave it out" in answer.err
    answer = cli(*words, "--fake-updates", 3)
    assert "--fake-updates is for --objective dmd" in answer.err
    more = ("--objective", "dmd", "--fake", "full", "--fake-lora-rank", 3)
    assert "--fake-lora-rank is for --fake lora" in cli(*words, *more).err
