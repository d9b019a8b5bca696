"""What a step does: clipping, accumulation, learning rates, divergence, fp16's overflows."""

import json

import pytest
import torch

from shared.errors import UserError
from tests.support.runs import KINDS, tensors, train, untimed
from train.config import DistillConfig
from train.state import checkpoint
from train.trainer import loop
from train.trainer.loop import distill
from train.trainer.run import Distillation
from train.trainer.setup import prepare


@pytest.fixture
def settings(tiny_cache, tiny_sd, tmp_path):
    """The flags of a small run; `settings(seed=1)` changes some."""

    def make(run: str = "run", **more) -> DistillConfig:
        flags = {
            "model": str(tiny_sd), "cache": tiny_cache, "run": tmp_path / run, "threads": 1,
            "train_batch_size": 4, "max_train_steps": 6, "checkpointing_steps": 3, "lora_rank": 4,
            "logging_steps": 2, "validation_steps": 0, "learning_rate": 1e-3,
        }  # fmt: skip
        if more.get("student") == "full":
            flags["unet_time_cond_proj_dim"] = flags.pop("lora_rank") * 4
        return DistillConfig(**flags | more)

    return make


def spy_on_steps(run: Distillation, seen: list) -> None:
    step = run.optimizer.step

    def watching():
        gradients = [p.grad for p in run.parameters.values() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        seen.append((run.optimizer.param_groups[0]["lr"], float(norm)))
        return step()

    run.optimizer.step = watching


# ---- Steps.


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_clipped(settings, kind):
    seen = []
    run = prepare(settings(student=kind, max_grad_norm=1e-3, max_train_steps=2, logging_steps=1))
    spy_on_steps(run, seen)
    distill(run)
    before = [line["grad_norm"] for line in untimed(run.config.run)]
    assert min(before) > 2e-3  # what is logged is the norm before clipping
    assert [norm for _, norm in seen] == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_accumulated_gradients_are_those_of_the_whole_batch(settings):
    parts = {"train_batch_size": 2, "gradient_accumulation_steps": 4}
    for name, more in (("whole", {"train_batch_size": 8}), ("parts", parts)):
        train(settings(name, student="full", max_train_steps=1, logging_steps=1, **more))
    whole, parts = (untimed(settings(name).run)[0] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-4)


def test_learning_rate_is_a_function_of_the_step(settings):
    seen = []
    run = prepare(settings(lr_warmup_steps=2, lr_scheduler="linear", max_train_steps=6))
    spy_on_steps(run, seen)
    distill(run)
    assert [lr / 1e-3 for lr, _ in seen] == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rate_unless_given(settings, kind):
    seen = []
    run = prepare(settings(student=kind, learning_rate=None, max_train_steps=1))
    spy_on_steps(run, seen)
    distill(run)
    assert seen[0][0] == {"lora": 1e-4, "full": 8e-6}[kind]
    assert json.loads((run.config.run / "config.json").read_text())["learning_rate"] == seen[0][0]


def test_a_diverged_run_says_so(settings):
    config = settings(checkpointing_steps=1, max_train_steps=4)
    run = prepare(config)
    seen = []

    def poison():
        seen.append(1)
        if len(seen) == 3:
            for group in run.optimizer.param_groups:
                group["params"][0].data.fill_(float("nan"))

    run.optimizer.register_step_pre_hook(lambda *_: poison())
    with pytest.raises(UserError, match=r"(nan|finite) at step [34].*--learning-rate") as error:
        distill(run)
    assert f"the last checkpoint is {checkpoint.whole_checkpoints(config.run)[-1]}" in str(
        error.value
    )
    assert "\n" not in str(error.value)
    told = json.loads((config.run / "diverged.json").read_text())
    expected = run.loader.names(told["step"] - 1)
    assert told["samples"] == expected
    assert expected[0] in str(error.value)
    assert ".tar sample " in expected[0]


def test_an_exploding_loss_stops_the_run(settings):
    run = prepare(settings(learning_rate=1e6, max_train_steps=20, lr_scheduler="constant"))
    with pytest.raises(UserError, match=r"the loss is \S+ at step .*--learning-rate"):
        distill(run)


# ---- fp16, whose overflowing steps are left out; SIGTERM.


def test_a_skipped_fp16_step_is_not_counted_and_its_samples_are_gone(settings, monkeypatch):
    config = settings(student="full", mixed_precision="fp16", logging_steps=1, max_train_steps=3)
    run = prepare(config)
    loss = type(run.objective).__call__
    batches, averages = [], []

    def overflowing(objective, batch, *rest):
        batches.append(batch.latents.clone())
        value = loss(objective, batch, *rest)
        return value * float("inf") if len(batches) == 2 else value

    monkeypatch.setattr(type(run.objective), "__call__", overflowing)
    moved = run.student.after_step
    run.student.after_step = lambda: (averages.append(len(batches)), moved())
    distill(run)
    assert [line["step"] for line in untimed(config.run)] == [1, 2, 3]
    assert averages == [1, 3, 4]  # the second batch did not reach the EMA
    assert not torch.equal(batches[1], batches[2])
    state = checkpoint.read_progress(checkpoint.checkpoint_folder(config.run, 3))
    assert (state.step, state.position) == (3, 16)
    assert state.scaler["scale"] == 2.0**15  # halved once
    assert all(torch.isfinite(t).all() for t in tensors(config.run, 3).values())


def test_fp16_that_overflows_at_every_scale_says_so(settings, monkeypatch):
    monkeypatch.setattr(loop, "SMALLEST_SCALE", 2.0**13)  # three halvings, not sixteen
    run = prepare(settings(mixed_precision="fp16"))
    loss = type(run.objective).__call__
    monkeypatch.setattr(type(run.objective), "__call__", lambda *a: loss(*a) * float("inf"))
    with pytest.raises(UserError, match="overflow fp16 at every loss scale; use --mixed-prec"):
        distill(run)
