"""Which checkpoint a run goes on from: branches, damage, another run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from tests.support.runs import metrics, names, train
from train.config import DistillConfig, ExportConfig
from train.state import checkpoint
from train.trainer.export_command import export_checkpoint
from train.trainer.loop import distill
from train.trainer.setup import check_resumed, prepare

LATEST = {"resume_from_checkpoint": "latest"}


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


def fake(run: Path, step: int, limit: int | None = None, branch: int = 0) -> Path:
    progressed = checkpoint.TrainingState(step, 4 * step, 4, {"seed": 0}, branch=branch)
    weights = {"w": torch.full((3,), float(step))}
    return checkpoint.save_checkpoint(
        run, checkpoint.Checkpoint(progressed, weights, {"w/step": torch.ones(1)}), limit
    )


# ---- Going on from an older checkpoint.


def test_a_run_that_went_on_from_an_older_checkpoint_is_the_latest(settings, capsys):
    """Steps 1, 2, 3; then 2 and 3 again from step 1 with another learning rate; then on to 4."""
    train(settings(max_train_steps=3))
    root = checkpoint.checkpoint_folder(settings().run, 1)
    again = settings(resume_from_checkpoint=str(root), learning_rate=1e-5)
    train(again)
    assert "step-00000003 is no longer its latest" in capsys.readouterr().err
    assert names(again.run) == ["step-00000003", "step-00000001", "step-00000002"]
    here = load_file(again.run / "checkpoints/step-00000002/networks.safetensors")
    assert [line["step"] for line in metrics(again.run)] == [1, 2]
    ended = load_file(again.run / "pytorch_lora_weights.safetensors")
    export_checkpoint(again.run, ExportConfig())
    exported = load_file(again.run / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(ended[name], exported[name]) for name in ended)
    run = prepare(settings(max_train_steps=4, checkpoints_total_limit=2, **LATEST))
    assert run.step == 2
    assert all(torch.equal(here[name], value) for name, value in run.student.state().items())
    distill(run)
    assert names(again.run) == ["step-00000003", "step-00000004"]
    assert [line["step"] for line in metrics(again.run)] == [1, 2, 3, 4]


def test_what_was_abandoned_stays_until_the_new_branch_has_a_checkpoint(tmp_path):
    first, _, third = (fake(tmp_path, step) for step in (1, 2, 3))
    assert checkpoint.start_branch(tmp_path, third) == 0  # the latest: no branch
    assert checkpoint.start_branch(tmp_path, first) == 1
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000001"]
    # Killed before it saved: `latest` is where metrics.jsonl has been cut.
    assert checkpoint.find_checkpoint(tmp_path, "latest") == first
    assert checkpoint.start_branch(tmp_path, first) == 1
    fake(tmp_path, 4, limit=2, branch=1)
    assert names(tmp_path) == ["step-00000001", "step-00000004"]
    assert checkpoint.read_progress(first) == checkpoint.TrainingState(
        1, 4, 4, {"seed": 0}, branch=1
    )


def test_a_branch_from_another_runs_checkpoint(tmp_path):
    """That one is left alone; what is written here counts as the latest here."""
    other = fake(tmp_path / "other", 1)
    before = (other / "state.json").read_bytes()
    assert checkpoint.start_branch(tmp_path / "run", other) == 0
    fake(tmp_path / "run", 5)
    branch = checkpoint.start_branch(tmp_path / "run", other)
    fake(tmp_path / "run", 2, branch=branch)
    assert names(tmp_path / "run") == ["step-00000005", "step-00000002"]
    assert (other / "state.json").read_bytes() == before


def test_fewer_steps_than_were_taken_are_refused(settings):
    before = checkpoint.TrainingState(2, 4, 2, {})
    with pytest.raises(UserError, match="has 2 steps behind it, more than --max-train-steps 1"):
        check_resumed(Path("step-00000002"), before, {}, settings(max_train_steps=1))


# ---- Damaged checkpoints.


@pytest.mark.parametrize("name", ["networks.safetensors", "optimizer.safetensors", "state.json"])
def test_a_cut_off_checkpoint_is_not_the_latest(tmp_path, capsys, name):
    whole, cut = fake(tmp_path, 1), fake(tmp_path, 2)
    content = (cut / name).read_bytes()
    (cut / name).write_bytes(content[:-5])
    assert checkpoint.find_checkpoint(tmp_path, "latest") == whole
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{cut} is damaged" in said
    assert name in said
    with pytest.raises(UserError, match="not a whole checkpoint") as error:
        checkpoint.find_checkpoint(tmp_path, str(cut))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_a_damaged_file_of_the_right_size_is_one_line(tmp_path):
    whole, folder = fake(tmp_path, 1), fake(tmp_path, 2)
    path = folder / "networks.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert checkpoint.find_checkpoint(tmp_path, "latest") == whole  # the header tells
    with pytest.raises(UserError, match=r"is damaged .*; resume from another") as error:
        checkpoint.load_networks(folder)
    assert "\n" not in str(error.value)


def test_checkpoints_of_older_versions_go_on(settings):
    """Without sizes, branch and the scheduler's terms; a full fine-tuning named no weights."""
    config = settings(student="full", objective="denoise", max_train_steps=1)
    folder = checkpoint.checkpoint_folder(train(config).config.run, 1)
    state = json.loads((folder / "state.json").read_text())
    for name in ("files", "branch"):
        del state[name]
    for name in ("model", "prediction_type", "beta_start"):
        del state["terms"][name]
    state["terms"]["teacher"] = "e3b0c44298fc1c14"
    (folder / "state.json").write_text(json.dumps(state))
    assert prepare(replace(config, **LATEST)).step == 1


def edited(model: Path, copy: Path, **scheduler) -> str:
    """A copy of a model with other settings of its scheduler."""
    shutil.copytree(model, copy)
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    return str(copy)


# ---- What makes it another run.


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_another_noise_schedule_is_another_run(settings, tiny_sd, tmp_path, kind):
    train(settings(student=kind, objective="denoise", max_train_steps=1))
    other = edited(tiny_sd, tmp_path / "v", prediction_type="v_prediction", beta_end=0.5)
    with pytest.raises(UserError, match=r"beta_end is 0.0\d+ there, 0.5 here; prediction_type is"):
        prepare(settings(model=other, student=kind, objective="denoise", **LATEST))


def test_a_full_fine_tuning_knows_the_weights_it_began_with(settings, tiny_sd, tmp_path):
    flags = {"student": "full", "objective": "denoise"}
    train(settings(max_train_steps=1, **flags))
    other = edited(tiny_sd, tmp_path / "other")
    [path] = Path(other, "unet").glob("*.safetensors")
    tensors = load_file(path)
    tensors["conv_in.bias"] = -tensors["conv_in.bias"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"model is [0-9a-f]{16} there, [0-9a-f]{16} here"):
        prepare(settings(model=other, **flags, **LATEST))
    same = edited(tiny_sd, tmp_path / "same")
    assert prepare(settings(model=same, mixed_precision="bf16", **flags, **LATEST)).step == 1


def test_a_run_may_go_on_in_fp16(settings):
    train(settings(max_train_steps=1))
    assert prepare(settings(mixed_precision="fp16", **LATEST)).scaler.get_scale() == 2.0**16
