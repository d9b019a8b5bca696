"""The same run on one process and on several: same gradients, same weights, same samples."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.fsdp  # or each forked process would, for seconds
from safetensors.torch import load_file

from shared.errors import UserError
from tests.support.launched import FSDP, TWO, launcher
from train.config import DistillConfig
from train.state import checkpoint
from train.trainer.distributed import Distributed, as_launched


@pytest.fixture
def launch(repo, tiny_cache, tiny_sd, tmp_path):
    return launcher(repo, tmp_path, tiny_sd, tiny_cache)


def torchrun_in_background(repo: Path, words, environment=None, world: int = 2):
    command = [sys.executable, "-m"]
    if world > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(
        [*command, *map(str, words)], cwd=repo, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def torchrun(repo: Path, world: int, words, environment=None) -> subprocess.CompletedProcess:
    with torchrun_in_background(repo, words, environment, world) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = checkpoint.checkpoint_folder(run, step)
    return load_file(folder / "networks.safetensors") | load_file(folder / "optimizer.safetensors")


def gradients(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(Path(f"{run}-spied") / "gradients.pt", weights_only=True)


def relative(a: dict, b: dict) -> float:
    """The largest relative difference (L2) of any tensor."""
    assert a.keys() == b.keys()
    assert len(a) > 50
    return max(
        float((a[n] - b[n]).norm() / b[n].norm())
        for n in a
        if b[n].is_floating_point() and b[n].norm()
    )


def served(run: Path) -> list[dict]:
    """What all processes consumed, leg by leg."""
    files = sorted(Path(f"{run}-spied").glob("ids-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def ids_by_position(run: Path) -> dict[int, int]:
    return {
        position: sample
        for line in served(run)
        for position, sample in zip(line["positions"], line["ids"], strict=True)
    }


# Of distribution matching both networks learn in each step, here by two micro-steps.
DMD = {"objective": "dmd", "fake_warmup_steps": 0, "fake_updates": 1, "gan_weight": 0.1,
       "num_student_steps": 2, "student": "lora"}  # fmt: skip
MICRO = {"train_batch_size": 1, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("flags", "two_of"),
    [
        pytest.param({"student": "lora"}, TWO, id="lora"),
        pytest.param({"student": "full"}, TWO, id="full", marks=pytest.mark.slow),
        pytest.param(DMD, MICRO, id="dmd", marks=pytest.mark.slow),
        pytest.param(DMD | {"student": "full"}, MICRO, id="dmd-full", marks=pytest.mark.slow),
        pytest.param(DMD | {"fake": "full"}, TWO, id="dmd-fake-full", marks=pytest.mark.slow),
    ],
)
def test_two_processes_take_the_step_of_one(launch, flags, two_of):
    # In float64, because fp32's rounding alone moves the Huber loss's gradients by 1e-4 when the
    # student still is the teacher: they are the signs of differences that are nearly zero.
    one = launch("one", 1, double=True, **flags)
    for name, environment in (("ddp", None), ("fsdp", FSDP)):
        two = launch(name, 2, environment, double=True, **flags | two_of)
        assert relative(gradients(two), gradients(one)) < 1e-9, name
        assert (two / "metrics.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        ("tcd", "full"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [
            ("tcd", "lora"), ("pcm", "lora"), ("pcm", "full"), ("lcf", "lora"), ("lcf", "full"),
        ]),
    ],
)  # fmt: skip
def test_with_every_objective_two_processes_take_the_step_of_one(launch, objective, kind):
    flags = {"objective": objective, "student": kind, "double": True}
    one, two = launch("one", 1, **flags), launch("two", 2, **flags, **TWO)
    assert relative(gradients(two), gradients(one)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_in_fp32_two_processes_round_as_one_does(launch, kind):
    flags = {"objective": "denoise", "student": kind, "unet_time_cond_proj_dim": None}
    one, two = launch("one", 1, **flags), launch("two", 2, **flags, **TWO)
    assert relative(gradients(two), gradients(one)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_twenty_steps_in_float64_are_the_same(launch, kind):
    steps = {"max_train_steps": 20, "checkpointing_steps": 20, "student": kind}
    one = launch("one", 1, double=True, **steps)
    two = launch("two", 2, double=True, gradient_accumulation_steps=2, train_batch_size=1, **steps)
    assert relative(weights(two, 20), weights(one, 20)) < 1e-9


@pytest.mark.slow
def test_the_world_may_change_and_every_sample_comes_once(launch, tiny_cache):
    samples = json.loads((tiny_cache / "manifest.json").read_text())["totals"]["written"]
    steps = samples // 4
    legs = [(1, 4, steps // 3), (2, 2, 2 * steps // 3), (1, 2, steps)]
    for world, size, until in legs:
        run = launch(
            "run", world, train_batch_size=size, max_train_steps=until,
            resume_from_checkpoint="latest",
        )  # fmt: skip
    whole = launch("whole", 1, max_train_steps=steps)
    assert sorted(p for line in served(run) for p in line["positions"]) == list(range(4 * steps))
    ids = {
        p: i for line in served(run) for p, i in zip(line["positions"], line["ids"], strict=True)
    }
    alone = {
        p: i for line in served(whole) for p, i in zip(line["positions"], line["ids"], strict=True)
    }
    assert ids == alone
    assert len(set(ids.values())) == 4 * steps
    assert relative(weights(run, steps), weights(whole, steps)) < 1e-2


@pytest.mark.slow
def test_torchrun_starts_a_run_of_two_processes(repo, tiny_cache, tiny_sd, tmp_path):
    """The command as a launcher types it, once for real; `launch` only sets its variables."""
    words = [
        "train", "--", "distill", "--model", tiny_sd, "--cache", tiny_cache, "--run", tmp_path,
        "--train-batch-size", 2, "--max-train-steps", 1, "--validation-steps", 0, "--lora-rank", 2,
    ]  # fmt: skip
    answer = torchrun(repo, 2, words)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.count("over 2 processes") == 1
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("environment", [None, FSDP], ids=["ddp", "fsdp"])
def test_all_enter_saving_and_previews_and_one_signal_ends_all(
    repo, tiny_cache, tiny_sd, tmp_path, environment
):
    """The command as a launcher types it; SIGTERM reaches one process of two."""
    run = tmp_path / "run"
    words = [
        "train", "--", "distill", "--model", tiny_sd, "--cache", tiny_cache, "--run", run,
        "--train-batch-size", 2, "--logging-steps", 1, "--max-train-steps", 2000,
        "--validation-steps", 2, "--checkpointing-steps", 2, "--student", "full",
        "--resume-from-checkpoint", "latest",
    ]  # fmt: skip
    with torchrun_in_background(repo, words, environment) as process:
        log = run / "metrics.jsonl"
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 5):
            time.sleep(0.1)
        os.kill(ranks_of(process)[1], signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err.count("stopped after step") == 1
    stopped = checkpoint.whole_checkpoints(run)[-1]
    step = checkpoint.read_progress(stopped).step
    assert 5 <= step < 2000
    assert (run / "previews" / "step-00000004.png").exists()
    words[words.index("--max-train-steps") + 1] = step + 2
    again = torchrun(repo, 2, words, environment)
    assert again.returncode == 0, again.stderr
    assert load_file(run / "unet" / "diffusion_pytorch_model.safetensors")


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The worker processes of a launcher, in the order of their start."""
    return sorted(child.pid for child in psutil.Process(process.pid).children())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed has not been tested"),
        ({"ACCELERATE_USE_FSDP": "true"}, "add --fsdp_version 2"),
    ],
)
def test_what_accelerate_can_launch_and_we_cannot_is_refused(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        Distributed("cpu")
    assert "\n" not in str(error.value)


def test_what_the_launcher_was_told_holds(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    config = DistillConfig("tiny-sd", cache=Path("c"), run=Path("r"))
    told = as_launched(config)
    assert (told.mixed_precision, told.gradient_accumulation_steps) == ("bf16", 4)
    own = replace(config, mixed_precision="fp16", gradient_accumulation_steps=2)
    assert as_launched(own) == own
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="fp8 is not for this trainer"):
        as_launched(config)
