"""What a run keeps and reports: branches of checkpoints, seeds, guards, trackers."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.errors import UserError
from train.config import DistillConfig, ExportConfig
from train.state import checkpoint
from train.trainer import loop, trackers
from train.trainer import metrics as record
from train.trainer.export_command import export_checkpoint
from train.trainer.loop import distill
from train.trainer.run import Distillation
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


def train(config: DistillConfig) -> Distillation:
    run = prepare(config)
    distill(run)
    return run


def metrics(run: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def names(run: Path) -> list[str]:
    return [folder.name for folder in checkpoint.whole_checkpoints(run)]


# ---- Going on from an older checkpoint.


def fake(run: Path, step: int, limit: int | None = None, branch: int = 0) -> Path:
    progressed = checkpoint.TrainingState(step, 4 * step, 4, {"seed": 0}, branch=branch)
    weights = {"w": torch.full((3,), float(step))}
    return checkpoint.save_checkpoint(
        run, checkpoint.Checkpoint(progressed, weights, {"w/step": torch.ones(1)}), limit
    )


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


# ---- What makes it another run.


def edited(model: Path, copy: Path, **scheduler) -> str:
    """A copy of a model with other settings of its scheduler."""
    shutil.copytree(model, copy)
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    return str(copy)


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


# ---- Guards.


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


# ---- Trackers.


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (("foo",), "--report-to foo: not one of tensorboard, wandb, .*, none"),
        (("tensorboard", "wandb"), "--report-to wandb is not installed; pip install wandb"),
        (("none", "tensorboard"), "leave out none, or the others"),
    ],
)
def test_a_tracker_that_cannot_be_had_is_refused_at_once(settings, monkeypatch, told, message):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=message) as error:
        prepare(settings(report_to=told))
    assert "\n" not in str(error.value)
    assert not settings().run.exists()


def test_a_service_that_refuses_is_one_line(settings, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no API key configured.\nUsage: ...")

    monkeypatch.setattr(trackers.Accelerator, "init_trackers", refuse)
    with pytest.raises(UserError, match="tensorboard: no API key configured") as error:
        train(settings(report_to=("tensorboard",)))
    assert "\n" not in str(error.value)


class Second:
    """A tracker that writes down what it is given, in its order."""

    name = "wandb"
    tracker = None

    def __init__(self) -> None:
        self.got: list[tuple[str, int]] = []

    def log(self, values, step):
        self.got += [(name, step) for name in values if name == "train/loss"]

    def log_images(self, values, step):
        self.got += [(name, step) for name in values]

    def finish(self):
        self.got.append(("finished", 0))
        raise ConnectionError("gone.\nAsk your administrator.")


@pytest.fixture
def reported(settings, monkeypatch, capsys):
    """A run with TensorBoard and a second tracker, whose numbers lag behind as on a GPU."""
    close, begin, second = record.Recorder._close_window, trackers.Trackers.__init__, Second()

    class Event:
        def synchronize(self):
            pass

    def close_later(*args):
        return replace(close(*args), arrived=Event())

    def begin_with_another(self, *args):
        begin(self, *args)
        self.trackers.append(second)

    monkeypatch.setattr(record.Recorder, "_close_window", close_later)
    monkeypatch.setattr(trackers.Trackers, "__init__", begin_with_another)
    flags = {"validation_steps": 2, "checkpointing_steps": 0, "max_train_steps": 5}
    run = train(settings(report_to=("tensorboard",), **flags))
    assert "note: wandb did not finish: gone\n" in capsys.readouterr().err
    assert (run.config.run / "pytorch_lora_weights.safetensors").is_file()
    return run, second


def test_every_tracker_gets_numbers_and_pictures_in_the_order_of_steps(reported):
    run, second = reported
    assert second.got == [
        ("train/loss", 1), ("train/loss", 2), ("previews", 2), ("train/loss", 3),
        ("train/loss", 4), ("previews", 4), ("train/loss", 5), ("previews", 5), ("finished", 0),
    ]  # fmt: skip
    [folder] = (run.config.run / "logs").iterdir()
    events = EventAccumulator(str(folder), {"images": 0, "scalars": 0}).Reload()
    lines = metrics(run.config.run)
    for name in ("loss", "grad_norm", "learning_rate", "samples_per_second", "loader_wait"):
        told = [(e.step, e.value) for e in events.Scalars(f"train/{name}")]
        assert told == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    for event in events.Images("previews"):
        (run.config.run / "shown.png").write_bytes(event.encoded_image_string)
        shown = np.asarray(Image.open(run.config.run / "shown.png"))
        drawn = Image.open(run.config.run / "previews" / f"step-{event.step:08d}.png")
        assert np.array_equal(shown, np.asarray(drawn))
    assert [event.step for event in events.Images("previews")] == [2, 4, 5]


def test_samples_per_second_are_those_of_the_steps(settings, monkeypatch):
    """A clock that previews and checkpoints advance by an hour, and steps by a second."""
    now = [0.0]
    run = prepare(settings(checkpointing_steps=1, logging_steps=2))
    monkeypatch.setattr(record.time, "perf_counter", lambda: now[0])

    def taking(seconds, work):
        def timed(*args, **options):
            now[0] += seconds
            return work(*args, **options)

        return timed

    run.student.after_step = taking(1.0, run.student.after_step)
    saving = taking(3600.0, checkpoint.save_checkpoint)
    monkeypatch.setattr(checkpoint, "save_checkpoint", saving)
    distill(run)
    rates = [line["samples_per_second"] for line in metrics(run.config.run)]
    assert rates == pytest.approx([2.0] * 2)  # two samples a step, and each save ends a line
