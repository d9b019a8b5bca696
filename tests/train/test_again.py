"""Ctrl-C saves, and the same command goes on; a changed one is told what differs."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shared.errors import UserError
from tests.support import warm
from train.state import checkpoint
from train.state.resume_checks import check_invariants
from train.trainer import loop
from train.trainer.run import Distillation

STUDENT = "pytorch_lora_weights.safetensors"
KOHYA = "kohya_lora_weights.safetensors"


@pytest.fixture(scope="module")
def flags(tiny_cache, tiny_sd) -> list[object]:
    """Those of a small run."""
    return [
        "--model", tiny_sd, "--cache", tiny_cache, "--threads", 1, "--train-batch-size", 2,
        "--max-train-steps", 4, "--lora-rank", 2, "--lora-dropout", 0.2, "--validation-steps", 0,
        "--device", "cpu", "--logging-steps", 1, "--report-to", "none", "--checkpointing-steps", 3,
    ]  # fmt: skip


@pytest.fixture
def words(flags, tmp_path) -> list[object]:
    """The command of a small run in tmp_path/run; a later flag wins."""
    return ["distill", *flags, "--run", tmp_path / "run"]


@pytest.fixture(scope="module")
def whole(flags, repo, tmp_path_factory) -> Path:
    """The run that nobody interrupted. Do not write into it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    words = ["-m", "train", "distill", *flags, "--run", run]
    warm.run(words, repo, OMP_NUM_THREADS="1").check_returncode()
    return run


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """The same as one's own, where `distil` has its run."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def distil(cli, words):
    return lambda *more: cli("train", *words, *more)


def interrupt_in(monkeypatch, owner: Any, name: str, times: int = 1) -> None:
    """Ctrl-C when `owner.name` is entered first."""
    real, calls = getattr(owner, name), []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, interrupted)


def same_tensors(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoint.whole_checkpoints(run)]


MOMENTS = {  # where, and how often Ctrl-C; the status and the checkpoints it leaves
    "before anything": ("train.trainer.setup", "build_student", 1, 130, []),
    "after the first step": ("train.trainer.loop", "settle", 1, 130, ["step-00000001"]),
    "twice": ("train.trainer.loop", "settle", 2, 130, []),
    "in a save": ("train.state.checkpoint", "move", 1, 130, ["step-00000003"]),
    "twice in a save": ("train.state.checkpoint", "move", 2, 130, []),
    "twice in the export": ("train.trainer.run", "write_export", 2, 130,
                            ["step-00000003", "step-00000004"]),
}  # fmt: skip


SLOW = ("after the first step", "twice", "in a save")  # the others differ more


@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in MOMENTS]
)
def test_the_same_command_ends_with_the_bits_of_one_that_nobody_interrupted(
    distil, monkeypatch, tmp_path, whole, moment
):
    module, name, times, status, saved = MOMENTS[moment]
    run = tmp_path / "run"
    interrupt_in(monkeypatch, importlib.import_module(module), name, times)
    answer = distil()
    monkeypatch.undo()
    assert answer.status == status
    assert "the same command goes on from there" in answer.err.splitlines()[-1]
    assert "Traceback" not in answer.err
    assert names(run) == saved
    assert not (run / "owner.json").exists()
    again = distil()
    assert again.status == 0, again.err
    assert (f"from {run}/checkpoints/{saved[-1]}" if saved else "from the teacher") in again.err
    for file in (STUDENT, "checkpoints/step-00000004/optimizer.safetensors"):
        assert same_tensors(run / file, whole / file)
    assert steps(run) == steps(whole) == [1, 2, 3, 4]


def test_ctrl_c_in_the_export_waits_for_it(distil, monkeypatch, tmp_path):
    interrupt_in(monkeypatch, Distillation, "export")
    answer = distil()
    assert answer.status == 0
    assert "Ctrl-C again ends at once" in answer.err
    assert (tmp_path / "run" / "README.md").is_file()


def test_a_finished_run_says_so_and_exports_what_is_missing(distil, monkeypatch, finished):
    run = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for more in ((), ("--resume-from-checkpoint", "latest")):
        answer = distil(*more)
        assert answer.status == 0
        assert f"{run} is finished: all 4 steps are taken" in answer.out
        assert "--max-train-steps" in answer.out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    for lost in (STUDENT, KOHYA, "README.md", "scheduler"):
        path = run / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        answer = distil()
        assert (answer.status, "student: " in answer.out) == (0, True)
        assert path.exists()
    for damaged in (STUDENT, KOHYA):  # by a crash of the machine, say
        whole = (run / damaged).read_bytes()
        (run / damaged).write_bytes(whole[: len(whole) // 2])
        distil()
        assert (run / damaged).read_bytes() == whole
    assert steps(run) == [1, 2, 3, 4]
    monkeypatch.setattr(importlib.import_module("train.export.student"), "write_card", interrupted)
    distil("--max-train-steps", 5, "--resume-from-checkpoint", "latest")
    monkeypatch.undo()  # the card is that of 4 steps, the weights are of 5
    answer = distil("--max-train-steps", 5)
    assert "student: " in answer.out
    assert "| max_train_steps | 5 |" in (run / "README.md").read_text()


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("change", "said", "way"),
    [
        (["--seed", 3], "seed is 0 there, 3 here", "give the former"),
        (["--huber-c", 0.5], "huber_c is 0.001 there, 0.5 here", "give the former"),
        (["--learning-rate", 0.5], "learning_rate is 0.0001 there, 0.5 here", "latest goes on"),
        (["--max-train-steps", 9], "max_train_steps is 4 there, 9 here", "latest goes on"),
        (["--train-batch-size", 4], "train_batch_size is 2 there, 4 here", "latest goes on"),
    ],
)
def test_a_changed_command_is_refused_and_told_what_differs(distil, finished, change, said, way):
    run = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    answer = distil(*change)
    assert answer.status == 1
    line = answer.err.splitlines()[-1]
    assert f"{run} was begun with other flags: {said}; " in line
    assert way in line
    assert "another --run" in line
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_what_the_student_does_not_depend_on_may_change(distil, monkeypatch, finished):
    monkeypatch.chdir(finished.parent)
    (finished / STUDENT).unlink()
    more = ("--checkpointing-steps", 1, "--checkpoints-total-limit", 5)
    answer = distil("--threads", 2, "--run", "run", *more)
    assert (answer.status, "step-00000004" in answer.err) == (0, True)


def test_lines_without_a_checkpoint_are_written_again_by_the_same_run_only(distil, finished):
    """It was killed before it saved: its lines are those that the same command writes."""
    run = finished
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_text()
    for more in ((), ("--resume-from-checkpoint", "latest")):
        answer = distil("--seed", 3, *more)
        assert answer.status == 1
        assert "seed is 0 there, 3 here; give the former, or choose another --run" in answer.err
        assert (run / "metrics.jsonl").read_text() == before
    assert distil().status == 0
    assert steps(run) == [1, 2, 3, 4]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(distil, finished):
    run = finished
    shutil.rmtree(run / "checkpoints/step-00000003")
    (run / "checkpoints/step-00000004/optimizer.safetensors").write_bytes(b"cut")
    answer = distil()
    assert answer.status == 1
    assert (
        f"no checkpoint in {run} is whole (step-00000004: optimizer.safetensors has 3 of"
        in (answer.err.splitlines()[-1])
    )
    assert steps(run) == [1, 2, 3, 4]


# ---- Names of checkpoints, and another cache.


@pytest.mark.parametrize("name", ["step-3", "checkpoint-3", "3", "step-00000003", "{run}/step-3"])
def test_a_checkpoint_by_its_step(tmp_path, name):
    folder = checkpoint.checkpoint_folder(tmp_path, 3)
    progressed = checkpoint.TrainingState(3, 12, 4, {})
    checkpoint.save_checkpoint(tmp_path, checkpoint.Checkpoint(progressed, {}, {}), None)
    wanted = name.format(run=tmp_path / "checkpoints")
    assert checkpoint.find_checkpoint(tmp_path, wanted) == folder
    other = wanted.replace("3", "4") if "{" not in name else "checkpoint-4"
    with pytest.raises(UserError) as error:
        checkpoint.find_checkpoint(tmp_path, other.replace("00000004", "4"))
    assert "has no checkpoint of step 4; choose of those it has (step-00000003)" in str(error.value)


def test_a_cache_that_grew_is_told_with_a_way_on():
    before = {"cache": "a", "samples": 64, "seed": 0}
    with pytest.raises(UserError) as error:
        check_invariants(Path("step-3"), before, {"cache": "b", "samples": 96, "seed": 0})
    said = str(error.value)
    assert "a run on 64 samples, and the cache has grown by 32 to 96 since" in said
    assert "another --run" in said
    assert "another --cache" in said
    check_invariants(Path("step-3"), {"cache": "a"}, {"cache": "a", "samples": 96})


# ---- The real command.


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 2.0, 5.0, 8.0])
def test_ctrl_c_in_the_first_seconds(words, repo, seconds, tmp_path):
    command = [sys.executable, "-m", "train", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=repo, env=environment, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode in (130, 0, -signal.SIGINT), err
    assert "Traceback" not in err
    assert subprocess.run(command, cwd=repo, env=environment).returncode == 0
    assert (tmp_path / "run" / STUDENT).is_file()
    assert loop.INTERRUPTED == 130
