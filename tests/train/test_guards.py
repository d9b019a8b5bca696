"""Seeds, steps between checkpoints, and gradients that are not finite."""

import json
import math

import pytest
import torch

from shared.errors import UserError
from tests.support.runs import metrics, names, train
from train.config import DistillConfig
from train.trainer import loop
from train.trainer.loop import distill
from train.trainer.setup import prepare


@pytest.fixture
def settings(tiny_cache, tiny_sd, tmp_path):
    """The flags of a small run; `settings(seed=1)` changes some."""

    def make(**more) -> DistillConfig:
        flags = {
            "model": str(tiny_sd), "cache": tiny_cache, "run": tmp_path / "run", "threads": 1,
            "train_batch_size": 2, "max_train_steps": 2, "checkpointing_steps": 1, "lora_rank": 2,
            "logging_steps": 1, "validation_steps": 0, "learning_rate": 1e-3, "device": "cpu",
            "report_to": ("none",),
        }  # fmt: skip
        return DistillConfig(**flags | more)

    return make


def test_any_usual_seed_will_do(settings):
    train(settings(seed=2**63 - 1, max_train_steps=1))


def test_the_dropout_of_small_seeds_is_what_it_was():
    loop.seed_dropout(2**32 - 1, 7, 3)  # and others have one too
    loop.seed_dropout(281_000_000, 7, 3)
    assert torch.initial_seed() == (281_000_000 * 1_000_003 + 7) * 65_537 + 3


def test_no_steps_between_checkpoints_means_one_at_the_end(settings):
    run = train(settings(checkpointing_steps=0)).config.run
    assert names(run) == ["step-00000002"]
    assert [line["step"] for line in metrics(run)] == [1, 2]


def test_no_steps_between_checkpoints_leave_the_weights_guarded(settings):
    config = settings(checkpointing_steps=0, max_train_steps=1, logging_steps=10)
    run = prepare(config)
    run.student.after_step = lambda: next(iter(run.parameters.values())).data.fill_(math.nan)
    with pytest.raises(UserError, match="the weights are no longer finite at step 1"):
        distill(run)
    assert names(config.run) == []
    assert not list(config.run.glob("*.safetensors"))


def test_a_gradient_that_is_not_finite_blames_its_own_samples(settings):
    config = settings(max_train_steps=6, checkpointing_steps=6, logging_steps=5)
    run = prepare(config)
    seen = []

    def spoil(gradient):
        seen.append(1)
        return gradient * math.inf if len(seen) == 3 else gradient

    next(iter(run.parameters.values())).register_hook(spoil)
    with pytest.raises(UserError, match=r"the gradient norm is (inf|nan) at step 3 "):
        distill(run)
    assert metrics(config.run) == []
    told = json.loads((config.run / "diverged.json").read_text())
    assert told["samples"] == run.loader.names(2)
