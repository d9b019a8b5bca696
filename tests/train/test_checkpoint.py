"""Checkpoints are whole or absent, and only the last ones stay."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from shared.errors import UserError
from tests.support.runs import train
from train.config import DistillConfig
from train.state import checkpoint
from train.trainer.loop import distill
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


def fake_checkpoint(run: Path, step: int, limit: int | None = None) -> Path:
    progressed = checkpoint.TrainingState(step, 4 * step, 4, {"seed": 0})
    weights = {"w": torch.full((3,), float(step))}
    return checkpoint.save_checkpoint(
        run, checkpoint.Checkpoint(progressed, weights, {"w/step": torch.ones(1)}), limit
    )


def steps_in(run: Path) -> list[int]:
    return [checkpoint.read_progress(path).step for path in checkpoint.whole_checkpoints(run)]


# ---- Checkpoints.


def test_only_the_last_checkpoints_are_kept(settings):
    config = settings(checkpointing_steps=1, checkpoints_total_limit=2)
    train(config)
    assert steps_in(config.run) == [5, 6]
    assert sorted(path.name for path in (config.run / "checkpoints").iterdir()) == [
        "step-00000005", "step-00000006",
    ]  # fmt: skip


def test_without_a_limit_all_are_kept(tmp_path):
    for step in (1, 2, 10):
        fake_checkpoint(tmp_path, step)
    assert steps_in(tmp_path) == [1, 2, 10]
    assert checkpoint.find_checkpoint(tmp_path, "latest").name == "step-00000010"


def test_a_partial_checkpoint_is_never_the_latest(tmp_path):
    fake_checkpoint(tmp_path, 3)
    partial = fake_checkpoint(tmp_path, 6)
    (partial / "state.json").unlink()
    assert checkpoint.find_checkpoint(tmp_path, "latest").name == "step-00000003"
    with pytest.raises(UserError, match="not a whole checkpoint"):
        checkpoint.find_checkpoint(tmp_path, str(partial))
    with pytest.raises(UserError, match="step-00000003"):
        checkpoint.find_checkpoint(tmp_path, None)
    assert checkpoint.find_checkpoint(tmp_path / "new", "latest") is None
    assert checkpoint.find_checkpoint(tmp_path / "new", None) is None


@pytest.mark.parametrize("moment", ["publish", "dump_json", "sync_folder", "move"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_crash_while_saving_leaves_the_old_checkpoints(tmp_path, monkeypatch, moment, earlier):
    fake_checkpoint(tmp_path, 3)
    if earlier:  # step 6 exists already, from a run that was resumed from before it
        fake_checkpoint(tmp_path, 6)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, moment, crash)
    with pytest.raises(KeyboardInterrupt):
        fake_checkpoint(tmp_path, 6, limit=1)
    latest = checkpoint.find_checkpoint(tmp_path, "latest")
    step = checkpoint.read_progress(latest).step
    assert checkpoint.load_networks(latest)["w"].tolist() == [step] * 3
    assert 3 in steps_in(tmp_path)


@pytest.mark.parametrize("action", ["replace", "prune"])
def test_a_crash_while_removing_leaves_no_half_checkpoint(tmp_path, monkeypatch, action):
    old = fake_checkpoint(tmp_path, 3)

    def remove_one_and_crash(folder):
        (Path(folder) / "networks.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", remove_one_and_crash)
    with pytest.raises(KeyboardInterrupt):
        fake_checkpoint(tmp_path, *((3,) if action == "replace" else (6, 1)))
    for folder in checkpoint.whole_checkpoints(tmp_path):
        assert checkpoint.load_networks(folder)["w"].shape == (3,)
    assert old not in checkpoint.whole_checkpoints(tmp_path)


def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path, monkeypatch):
    fake_checkpoint(tmp_path, 3)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="the disk is full; free some space") as error:
        fake_checkpoint(tmp_path, 6)
    assert "\n" not in str(error.value)
    assert steps_in(tmp_path) == [3]


def test_a_pruned_checkpoint_is_not_the_one_just_written(tmp_path):
    """Going on from step 3 while step 6 of the former attempt is still there."""
    for step in (3, 6):
        fake_checkpoint(tmp_path, step)
    fake_checkpoint(tmp_path, 4, limit=1)
    assert 4 in steps_in(tmp_path)


# ---- fp16, whose overflowing steps are left out; SIGTERM.


def test_weights_that_are_not_finite_are_never_saved(settings):
    """One bad gradient makes every weight NaN; the loss would show it a step later."""
    config = settings(checkpointing_steps=1, checkpoints_total_limit=1, max_train_steps=4)
    run = prepare(config)
    name, parameter = next(iter(run.parameters.items()))
    seen = []

    def spoil(gradient):
        seen.append(name)
        return gradient * float("inf") if len(seen) == 3 else gradient

    parameter.register_hook(spoil)
    with pytest.raises(UserError, match="gradient norm is inf at step 3"):
        distill(run)
    for folder in checkpoint.whole_checkpoints(config.run):
        assert all(value.isfinite().all() for value in checkpoint.load_networks(folder).values())
    assert steps_in(config.run) == [2]
