"""A training run may be killed or stopped at any moment; run again it ends with the same bits."""

import importlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from tests.support import warm
from train.config import DistillConfig
from train.state import checkpoint
from train.trainer import loop
from train.trainer.run import Distillation
from train.trainer.setup import prepare

DRIVER = Path(__file__).parents[1] / "support" / "train_crash.py"
KINDS = ["lora", "full"]
SAVING = ["save", "save again", "branch"]


def drive(folder: Path, scenarios: list[str], *flags: object) -> dict[str, Any]:
    words = [DRIVER, *scenarios, "--work", folder, *flags]
    answer = warm.run(words, DRIVER.parents[2], OMP_NUM_THREADS="1")
    assert answer.returncode == 0, answer.stderr[-3000:]
    return dict(json.loads(answer.stdout))


# ---- Killed at every call that changes the run's folder.


@pytest.fixture(scope="module")
def saving(tmp_path_factory) -> dict[str, Any]:
    """Three checkpoints of which one is kept; one in the place of another; and a branch."""
    return drive(tmp_path_factory.mktemp("saving"), SAVING, "--every", 8)


def test_killed_at_each_eighth_moment_of_saving(saving):
    for scenario in saving.values():
        assert scenario["crashes"] > 5
        assert scenario["problems"] == []


@pytest.mark.slow
def test_killed_before_in_and_after_every_call_of_saving(tmp_path):
    saving = drive(tmp_path, SAVING)
    assert saving["save"]["crashes"] > 100
    assert saving["save again"]["crashes"] > 30
    assert saving["branch"]["crashes"] > 40
    for scenario in saving.values():
        assert scenario["problems"] == []


def test_a_power_cut_finds_whole_checkpoints(saving):
    """What a rename makes visible has been fsynced, and so has the rename, before it counts."""
    calls = saving["save"]["calls"]
    shown = [i for i, call in enumerate(calls) if call[-1].startswith("checkpoints/step-")]
    assert len(shown) == 3
    for i in shown:
        _, building, _ = calls[i]
        before, after = calls[:i], calls[i + 1 :]
        written = {call[1] for call in before if call[0] == "write"}
        parts = [call for call in before if call[0] == "replace" and call[2].startswith(building)]
        assert len(parts) == 3
        for _, staged, _ in parts:
            assert staged in written
            assert ["fsync", staged] in before
        assert ["fsync", building] in before
        assert after[0] == ["fsync", "checkpoints"]  # before any other checkpoint goes
    gone = [i for i, call in enumerate(calls) if call[1].startswith("checkpoints/step-")]
    assert len(gone) == 2
    assert all(calls[i + 1] == ["fsync", "checkpoints"] for i in gone)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_files(tmp_path, tiny_cache):
    """Where the second checkpoint comes, and about the export's card."""
    named = ["--modes", "before", "--named", "checkpoints/step-00000002", "README.md"]
    named += ["--every", 2]
    answer = drive(tmp_path, ["lora"], "--cache", tiny_cache, *named)["lora"]
    assert answer["problems"] == []
    assert answer["crashes"] == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_killed_while_it_notes_an_evaluation_ends_with_the_same_lines(tmp_path, tiny_cache):
    named = ["--named", "evaluations.jsonl"]
    answer = drive(tmp_path, ["evaluated"], "--cache", tiny_cache, *named)["evaluated"]
    assert answer["problems"] == []
    assert answer["crashes"] >= 10  # two lines, each written and fsynced


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_every_call_ends_with_the_same_files(tmp_path, tiny_cache, kind):
    """Dying just before each call is dying just after the one before it."""
    answer = drive(tmp_path, [kind], "--cache", tiny_cache, "--modes", "before", "half")[kind]
    assert answer["problems"] == []
    written = {Path(call[-1]).name for call in answer["calls"]}
    assert {"config.json", "metrics.jsonl", "README.md", "step-00000003.png"} <= written
    assert answer["crashes"] > 70


# ---- Killed and stopped at random moments.


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", [*KINDS, "pcm", "tcd", "lcf", "dmd"])
def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_files(tmp_path, tiny_cache, kind):
    flags = ["--cache", tiny_cache, "--signal", "KILL", "--count", 20, "--seed", 4]
    answer = drive(tmp_path, [kind], *flags)[kind]
    assert answer["problems"] == []
    assert answer["statuses"].count(-signal.SIGKILL) >= 15  # some may have ended just before
    assert answer["stages"] > 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_at_random_moments_ends_with_the_same_files(tmp_path, tiny_cache, kind):
    flags = ["--cache", tiny_cache, "--signal", "TERM", "--count", 8, "--seed", 4]
    answer = drive(tmp_path, [kind], *flags)[kind]
    assert answer["problems"] == []
    assert answer["statuses"].count(0) >= 3


# ---- SIGTERM at moments of interest.


@pytest.fixture
def words(tiny_cache, tiny_sd, tmp_path) -> list[object]:
    """The command line of a small run in tmp_path/run."""
    return [
        "train", "distill", "--model", tiny_sd, "--cache", tiny_cache, "--run", tmp_path / "run",
        "--threads", 1, "--train-batch-size", 2, "--max-train-steps", 3, "--lora-rank", 4,
        "--validation-steps", 0, "--device", "cpu",
    ]  # fmt: skip


def terminate_in(monkeypatch, owner: Any, name: str, when=lambda *_: True) -> None:
    """SIGTERM, sent twice, when `owner.name` is entered."""
    real = getattr(owner, name)

    def signalled(*args, **options):
        if when(*args):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, signalled)


def test_sigterm_before_the_first_step_is_a_line_and_leaves_nothing(
    cli, monkeypatch, words, tmp_path
):
    terminate_in(monkeypatch, importlib.import_module("train.trainer.setup"), "build_student")
    answer = cli(*words)
    assert answer.status == 143
    assert answer.err.splitlines()[-1].startswith("interrupted: ")
    assert not (tmp_path / "run").exists()


def test_sigterm_in_the_export_waits_for_it(cli, monkeypatch, words, tmp_path):
    terminate_in(monkeypatch, Distillation, "export")
    answer = cli(*words)
    assert answer.status == 0
    assert (tmp_path / "run" / "README.md").is_file()
    assert not any((tmp_path / "run" / "tmp").iterdir())


@pytest.mark.parametrize("every", [0, 2, 100])
def test_sigterm_saves_whatever_the_steps_between_checkpoints(
    cli, monkeypatch, words, tmp_path, every
):
    terminate_in(monkeypatch, loop, "settle")
    answer = cli(*words, "--checkpointing-steps", every)
    assert answer.status == 0
    assert "stopped after step 1; the same command goes on" in answer.err
    [saved] = checkpoint.whole_checkpoints(tmp_path / "run")
    assert saved.name == "step-00000001"
    assert not list((tmp_path / "run").glob("*.safetensors"))  # nothing exported of a part


def test_sigterm_right_after_a_resume_writes_nothing_again(cli, monkeypatch, words, tmp_path):
    terminate_in(monkeypatch, loop, "settle", lambda *_: True)
    cli(*words)
    monkeypatch.undo()
    [saved] = checkpoint.whole_checkpoints(tmp_path / "run")
    written = (saved / "state.json").stat().st_mtime_ns
    terminate_in(monkeypatch, loop, "closing")
    answer = cli(*words, "--resume-from-checkpoint", "latest")
    assert answer.status == 0
    assert "stopped after step 1; " in answer.err
    assert (saved / "state.json").stat().st_mtime_ns == written


# ---- What a checkpoint belongs to.


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_another_teacher_of_the_same_family_is_noticed(tiny_cache, tiny_sd, tmp_path, kind):
    """By its weights, wherever they lie and in whatever precision they are held."""
    shutil.copytree(tiny_sd, tmp_path / "moved")
    shutil.copytree(tiny_sd, tmp_path / "other")
    [weights] = (tmp_path / "other" / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] - 1
    save_file(tensors, weights, {"format": "pt"})

    def config(model: Path, **more) -> DistillConfig:
        return DistillConfig(
            model=str(model), cache=tiny_cache, run=tmp_path / "run", student=kind, lora_rank=4,
            threads=1, train_batch_size=2, max_train_steps=1, validation_steps=0, device="cpu",
            **more,
        )  # fmt: skip

    loop.distill(prepare(config(tiny_sd)))
    again = {"resume_from_checkpoint": "latest"}
    assert prepare(config(tmp_path / "moved", mixed_precision="bf16", **again)).step == 1
    with pytest.raises(UserError, match=r"teacher is [0-9a-f]{16} there, [0-9a-f]{16} here"):
        prepare(config(tmp_path / "other", **again))


def test_a_fine_tuning_is_not_resumed_as_a_distillation(cli, words):
    assert cli(*words, "--objective", "denoise").status == 0
    answer = cli(*words, "--resume-from-checkpoint", "latest")
    assert answer.status == 1
    assert "objective is denoise there, lcd here" in answer.err.splitlines()[-1]
