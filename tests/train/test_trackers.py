"""Every tracker gets the numbers and pictures of a run in the order of its steps."""

import resource
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.errors import UserError
from tests.support.runs import metrics, train
from train.config import DistillConfig
from train.state import checkpoint
from train.trainer.loop import distill
from train.trainer.reporting import metrics as record
from train.trainer.reporting import trackers
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


def test_lines_tell_samples_seen_and_the_peak_of_memory(settings):
    """Resumed too: samples go on counting. The peak is the process's, as the kernel counts it."""
    train(settings(max_train_steps=4, logging_steps=2, checkpointing_steps=2))
    shutil.rmtree(settings().run / "checkpoints" / "step-00000004")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    run = train(settings(max_train_steps=4, logging_steps=1, resume_from_checkpoint="latest"))
    lines = metrics(run.config.run)
    assert [(line["step"], line["samples"]) for line in lines] == [(2, 4), (3, 6), (4, 8)]
    peaks = [line["peak_process_memory_bytes"] for line in lines]
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert before <= peaks[1] <= peaks[2] <= now
    assert not [name for line in lines for name in line if "gpu" in name]


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
