"""Runs that stop, are killed or go on end as if they had never stopped."""

import json
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.cache.manifest import open_manifest
from shared.errors import UserError
from tests.support import warm
from tests.support.runs import KINDS, tensors, train, untimed
from train.config import DistillConfig
from train.state import checkpoint
from train.trainer.loop import distill
from train.trainer.reporting.log_lines import keep_until
from train.trainer.setup import prepare


@pytest.fixture(scope="module")
def flags(tiny_cache, tiny_sd):
    """Those of a small run."""
    return {
        "model": str(tiny_sd), "cache": tiny_cache, "threads": 1, "train_batch_size": 4,
        "max_train_steps": 6, "checkpointing_steps": 3, "lora_rank": 4, "logging_steps": 2,
        "validation_steps": 0, "learning_rate": 1e-3,
    }  # fmt: skip


@pytest.fixture
def settings(flags, tmp_path):
    """A small run; `settings(seed=1)` changes some of its flags."""

    def make(run: str = "run", **more) -> DistillConfig:
        small = {
            k: v for k, v in flags.items() if k != "lora_rank" or more.get("student") != "full"
        }
        width = {"unet_time_cond_proj_dim": 16} if more.get("student") == "full" else {}
        return DistillConfig(run=tmp_path / run, **small | width | more)

    return make


@pytest.fixture(scope="module")
def one_step(flags, tmp_path_factory):
    """A run that has taken one step. Do not write into it."""
    run = tmp_path_factory.mktemp("one-step") / "run"
    train(DistillConfig(run=run, **flags | {"max_train_steps": 1}))
    return run


@pytest.fixture
def begun(one_step, settings):
    """The same as one's own, where `settings()` has its run."""
    return shutil.copytree(one_step, settings().run)


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


def assert_same_run(a: Path, b: Path, step: int = 6) -> None:
    first, second = tensors(a, step), tensors(b, step)
    assert first.keys() == second.keys()
    assert len(first) > 100
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert untimed(a) == untimed(b)


# What a resume could forget: the position, dropout, warm-up, accumulation, Adam's moments, the EMA.
ROUGH = {
    "lora": {"lora_dropout": 0.3, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
    "full": {"gradient_accumulation_steps": 2, "train_batch_size": 3, "ema_decay": 0.7},
}


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one(settings, kind, capsys):
    rough = {"student": kind, "proportion_empty_prompts": 0.2, **ROUGH[kind]}
    whole = settings("whole", **rough)
    train(whole)
    halves = settings("halves", resume_from_checkpoint="latest", **rough)
    stop_at(halves, 5)  # steps 4 and 5 are lost; `latest` starts afresh where there is nothing
    assert [path.name for path in checkpoint.whole_checkpoints(halves.run)] == ["step-00000003"]
    train(halves)
    assert "step-00000003" in capsys.readouterr().err
    assert_same_run(whole.run, halves.run)
    assert [line["step"] for line in untimed(whole.run)] == [2, 3, 4, 6]
    half, end = tensors(whole.run, 3), tensors(whole.run, 6)
    moved = [name for name in end if not torch.equal(end[name], half.get(name, end[name]))]
    assert len(moved) > 50  # the second half did train


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_can_be_made_longer(settings, kind):
    long = settings("long", student=kind, max_train_steps=4)
    short = replace(long, run=long.run.parent / "short")
    train(long)
    train(replace(short, max_train_steps=2))
    train(replace(short, resume_from_checkpoint="latest"))
    first, second = (tensors(config.run, 4) for config in (long, short))
    assert len(first) > 100
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_flags_give_the_same_run_and_other_seeds_another(settings):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(settings(name, seed=seed, max_train_steps=2))
    a, b, c = (settings(name).run for name in "abc")
    assert_same_run(a, b, 2)
    assert untimed(a) != untimed(c)


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_previews_do_not_disturb_training(settings, kind):
    plain = settings("plain", student=kind, max_train_steps=2, **ROUGH[kind])
    drawn = replace(plain, run=plain.run.parent / "drawn", validation_steps=1)
    train(plain)
    train(drawn)
    assert_same_run(plain.run, drawn.run, 2)
    pictures = sorted(path.name for path in (drawn.run / "previews").iterdir())
    assert pictures == [f"step-0000000{step}.png" for step in (1, 2)]


def end_after(
    config: DistillConfig, lines: int, delay: float, repo: Path, by: int = signal.SIGKILL
) -> int:
    """Run the real command; signal it `delay` s after so many lines of metrics. Its status."""
    given = {k: v for k, v in vars(config).items() if v != getattr(DistillConfig, k, None)}
    words = [f"--{k}={v}" for k, v in given.items() if not isinstance(v, bool | tuple | frozenset)]
    log = config.run / "metrics.jsonl"
    process = warm.start(["-m", "train", "distill", *words], repo, OMP_NUM_THREADS="1")
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < lines):
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(by)
    return process.wait()


def killed_and_resumed(settings, repo, kind: str, kills: list[tuple[int, float]], steps: int):
    flags = {"student": kind, "max_train_steps": steps, "checkpointing_steps": 2,
             "logging_steps": 1, "checkpoints_total_limit": 2}  # fmt: skip
    whole = settings("whole", **flags)
    train(whole)
    killed = settings("killed", resume_from_checkpoint="latest", **flags)
    for lines, delay in kills:
        status = end_after(killed, lines, delay, repo)
        assert status == -signal.SIGKILL, "it was not killed in time: give it more steps"
    done = [path.name for path in checkpoint.whole_checkpoints(killed.run)]
    assert done, "killed before its first checkpoint"
    train(killed)
    assert_same_run(whole.run, killed.run, steps)
    assert [line["step"] for line in untimed(killed.run)] == list(range(1, steps + 1))
    assert not any((killed.run / "tmp").iterdir())


# ---- Killed without warning.


def test_a_killed_run_ends_with_the_same_bits(settings, repo):
    moment = random.uniform(0, 0.1)
    print(f"killed {moment} s after line 3")
    killed_and_resumed(settings, repo, "lora", [(3, moment)], steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(settings, repo, kind):
    moments = [(lines, random.uniform(0, 0.5)) for lines in (3, 12, 25, 38)]
    print(f"killed {moments}")
    killed_and_resumed(settings, repo, kind, moments, steps=90)


# ---- What may not change in between.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "seed is 0 there, 7 here"),
        ({"lora_rank": 8}, "lora_rank is 4 there, 8 here"),
        ({"student": "full"}, "student is lora there, full here"),
        ({"global_batch_size": 8}, "stands at sample 4, which is no whole number of such"),
        ({"train_batch_size": 3}, "4 does not divide by 3 samples .* use --train-batch-size 2"),
        ({"loss_type": "l2", "w_max": 9.0}, "loss_type is huber there, l2 here; w_max is None"),
    ],
)
def test_resuming_as_another_run_says_what_differs(settings, begun, change, message):
    before = (begun / "config.json").read_bytes()
    with pytest.raises(UserError, match=message) as error:
        prepare(settings(resume_from_checkpoint="latest", **change))
    assert "\n" not in str(error.value)
    assert (begun / "config.json").read_bytes() == before  # the run is as it was


@pytest.mark.usefixtures("begun")
def test_resuming_on_another_cache_is_refused_and_on_a_copy_is_not(settings, tiny_cache, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_cache, copy)
    train(settings(cache=copy, resume_from_checkpoint="latest", max_train_steps=2))
    manifest = json.loads((copy / "manifest.json").read_text())
    file = open_manifest(copy).shards[0].file
    (copy / file).rename(copy / "shards" / "other.tar")
    (copy / "manifest.json").write_text(json.dumps(manifest).replace(file, "shards/other.tar"))
    with pytest.raises(UserError, match=r"cache is [0-9a-f]{16} there, [0-9a-f]{16} here"):
        prepare(settings(cache=copy, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    "change", [{"learning_rate": 1e-5}, {"max_train_steps": 9}, {"dataloader_num_workers": 1},
               {"checkpointing_steps": 1, "logging_steps": 1}, {"train_batch_size": 2},
               {"global_batch_size": 2, "train_batch_size": 1}]
)  # fmt: skip
@pytest.mark.usefixtures("begun")
def test_what_may_change_in_between(settings, change):
    run = prepare(settings(resume_from_checkpoint="latest", **change))
    assert run.step == 1


def test_a_run_that_exists_is_not_overwritten(settings, begun):
    before = {path: path.stat().st_mtime_ns for path in begun.rglob("*")}
    with pytest.raises(UserError, match=r"seed is 0 there, 7 here; .* or choose another --run"):
        prepare(settings(max_train_steps=1, seed=7))
    assert {path: path.stat().st_mtime_ns for path in begun.rglob("*")} == before


def test_resuming_from_a_folder(settings):
    config = settings("run")
    train(config)
    final = tensors(config.run, 6)
    folder = checkpoint.checkpoint_folder(config.run, 3)
    train(settings("run", resume_from_checkpoint=str(folder)))
    again = tensors(config.run, 6)
    assert all(torch.equal(final[name], again[name]) for name in final)
    assert [line["step"] for line in untimed(config.run)] == [2, 3, 4, 6]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n{"st')  # torn by the kill
    keep_until(log, 3)
    assert log.read_text() == '{"step": 1}\n{"step": 3}\n'
    keep_until(log, 0)
    assert log.read_text() == ""


# ---- fp16, whose overflowing steps are left out; SIGTERM.


@pytest.mark.slow
def test_sigterm_saves_and_the_resumed_run_is_the_uninterrupted_one(settings, repo):
    flags = {"max_train_steps": 24, "checkpointing_steps": 1000, "logging_steps": 1}
    whole = settings("whole", **flags)
    train(whole)
    config = settings("run", resume_from_checkpoint="latest", **flags)
    assert end_after(config, 3, 0, repo, signal.SIGTERM) == 0
    saved = [path.name for path in checkpoint.whole_checkpoints(config.run)]
    assert len(saved) == 1
    assert saved != ["step-00000024"], "it ended before it was stopped: give it more steps"
    assert not list(config.run.glob("*.safetensors"))  # nothing exported of half a run
    train(config)
    assert_same_run(whole.run, config.run, 24)
