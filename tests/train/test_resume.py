"""Runs that stop and go on end as if they had never stopped; checkpoints are whole or absent."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.cache.manifest import open_manifest
from shared.errors import UserError
from train.config import DistillConfig
from train.state import checkpoint
from train.trainer.loop import distill
from train.trainer.metrics import keep_until
from train.trainer.run import Distillation
from train.trainer.setup import prepare

KINDS = ["lora", "full"]


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


def train(config: DistillConfig) -> Distillation:
    run = prepare(config)
    distill(run)
    return run


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


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("samples_per_second", "loader_wait")}
        for line in lines
    ]


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All that the checkpoint and the export of a run hold."""
    found = {}
    folder = checkpoint.checkpoint_folder(run, step)
    files = [folder / "networks.safetensors", folder / "optimizer.safetensors"]
    files += [run / "pytorch_lora_weights.safetensors", *sorted(run.glob("unet/*.safetensors"))]
    for file in files:
        if file.exists():
            found |= {f"{file.name}/{name}": value for name, value in load_file(file).items()}
    return found


def assert_same_run(a: Path, b: Path, step: int = 6) -> None:
    first, second = tensors(a, step), tensors(b, step)
    assert first.keys() == second.keys()
    assert len(first) > 100
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert metrics(a) == metrics(b)


# What a resume could forget: the position, dropout, warm-up, accumulation, Adam's moments, the EMA.
ROUGH = {
    "lora": {"lora_dropout": 0.3, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
    "full": {"gradient_accumulation_steps": 2, "train_batch_size": 3, "ema_decay": 0.7},
}


@pytest.mark.parametrize("kind", KINDS)
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
    assert [line["step"] for line in metrics(whole.run)] == [2, 3, 4, 6]
    moved = [n for n, t in tensors(whole.run, 6).items()
             if not torch.equal(t, tensors(whole.run, 3).get(n, t))]  # fmt: skip
    assert len(moved) > 50  # the second half did train


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_can_be_made_longer(settings, kind):
    train(settings("long", student=kind))
    train(settings("short", student=kind, max_train_steps=3))
    extended = settings("short", student=kind, resume_from_checkpoint="latest")
    train(extended)
    first, second = (tensors(extended.run.parent / name, 6) for name in ("long", "short"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_flags_give_the_same_run_and_other_seeds_another(settings):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(settings(name, seed=seed, max_train_steps=3))
    a, b, c = (settings(name).run for name in "abc")
    assert_same_run(a, b, 3)
    assert metrics(a) != metrics(c)


@pytest.mark.parametrize("kind", KINDS)
def test_previews_do_not_disturb_training(settings, kind):
    plain = settings("plain", student=kind, **ROUGH[kind])
    drawn = settings("drawn", student=kind, validation_steps=2, **ROUGH[kind])
    train(plain)
    train(drawn)
    assert_same_run(plain.run, drawn.run)
    pictures = sorted(path.name for path in (drawn.run / "previews").iterdir())
    assert pictures == [f"step-0000000{step}.png" for step in (2, 4, 6)]


# ---- Killed without warning.


def end_after(
    config: DistillConfig, lines: int, delay: float, repo: Path, by: int = signal.SIGKILL
) -> int:
    """Run the real command; signal it `delay` s after so many lines of metrics. Its status."""
    given = {k: v for k, v in vars(config).items() if v != getattr(DistillConfig, k, None)}
    words = [f"--{k}={v}" for k, v in given.items() if not isinstance(v, bool | tuple | frozenset)]
    command = [sys.executable, "-m", "train", "distill", *words]
    environment = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    log = config.run / "metrics.jsonl"
    with open(os.devnull, "w") as nothing:
        process = subprocess.Popen(
            command, cwd=repo, env=environment, stdout=nothing, stderr=nothing
        )
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
    assert [line["step"] for line in metrics(killed.run)] == list(range(1, steps + 1))
    assert not any((killed.run / "tmp").iterdir())


def test_a_killed_run_ends_with_the_same_bits(settings, repo):
    moment = random.uniform(0, 0.2)
    print(f"killed {moment} s after line 8")
    killed_and_resumed(settings, repo, "lora", [(8, moment)], steps=60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(settings, repo, kind):
    moments = [(lines, random.uniform(0, 0.5)) for lines in (3, 12, 25, 38)]
    print(f"killed {moments}")
    killed_and_resumed(settings, repo, kind, moments, steps=90)


# ---- Checkpoints.


def fake_checkpoint(run: Path, step: int, limit: int | None = None) -> Path:
    progressed = checkpoint.TrainingState(step, 4 * step, 4, {"seed": 0})
    weights = {"w": torch.full((3,), float(step))}
    return checkpoint.save_checkpoint(
        run, checkpoint.Checkpoint(progressed, weights, {"w/step": torch.ones(1)}), limit
    )


def steps_in(run: Path) -> list[int]:
    return [checkpoint.read_progress(path).step for path in checkpoint.whole_checkpoints(run)]


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
def test_resuming_as_another_run_says_what_differs(settings, change, message):
    train(settings(max_train_steps=1))
    before = (settings().run / "config.json").read_bytes()
    with pytest.raises(UserError, match=message) as error:
        prepare(settings(resume_from_checkpoint="latest", **change))
    assert "\n" not in str(error.value)
    assert (settings().run / "config.json").read_bytes() == before  # the run is as it was


def test_resuming_on_another_cache_is_refused_and_on_a_copy_is_not(settings, tiny_cache, tmp_path):
    train(settings(max_train_steps=1))
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
def test_what_may_change_in_between(settings, change):
    train(settings(max_train_steps=1))
    run = prepare(settings(resume_from_checkpoint="latest", **change))
    assert run.step == 1


def test_a_run_that_exists_is_not_overwritten(settings):
    config = settings(max_train_steps=1)
    train(config)
    before = {path: path.stat().st_mtime_ns for path in config.run.rglob("*")}
    with pytest.raises(UserError, match=r"seed is 0 there, 7 here; .* or choose another --run"):
        prepare(settings(max_train_steps=1, seed=7))
    assert {path: path.stat().st_mtime_ns for path in config.run.rglob("*")} == before


def test_resuming_from_a_folder(settings):
    config = settings("run")
    train(config)
    final = tensors(config.run, 6)
    folder = checkpoint.checkpoint_folder(config.run, 3)
    train(settings("run", resume_from_checkpoint=str(folder)))
    again = tensors(config.run, 6)
    assert all(torch.equal(final[name], again[name]) for name in final)
    assert [line["step"] for line in metrics(config.run)] == [2, 3, 4, 6]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n{"st')  # torn by the kill
    keep_until(log, 3)
    assert log.read_text() == '{"step": 1}\n{"step": 3}\n'
    keep_until(log, 0)
    assert log.read_text() == ""


# ---- Steps.


def spy_on_steps(run: Distillation, seen: list) -> None:
    step = run.optimizer.step

    def watching():
        gradients = [p.grad for p in run.parameters.values() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        seen.append((run.optimizer.param_groups[0]["lr"], float(norm)))
        return step()

    run.optimizer.step = watching


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_clipped(settings, kind):
    seen = []
    run = prepare(settings(student=kind, max_grad_norm=1e-3, max_train_steps=2, logging_steps=1))
    spy_on_steps(run, seen)
    distill(run)
    before = [line["grad_norm"] for line in metrics(run.config.run)]
    assert min(before) > 2e-3  # what is logged is the norm before clipping
    assert [norm for _, norm in seen] == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_accumulated_gradients_are_those_of_the_whole_batch(settings):
    parts = {"train_batch_size": 2, "gradient_accumulation_steps": 4}
    for name, more in (("whole", {"train_batch_size": 8}), ("parts", parts)):
        train(settings(name, student="full", max_train_steps=1, logging_steps=1, **more))
    whole, parts = (metrics(settings(name).run)[0] for name in ("whole", "parts"))
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
    assert [line["step"] for line in metrics(config.run)] == [1, 2, 3]
    assert averages == [1, 3, 4]  # the second batch did not reach the EMA
    assert not torch.equal(batches[1], batches[2])
    state = checkpoint.read_progress(checkpoint.checkpoint_folder(config.run, 3))
    assert (state.step, state.position) == (3, 16)
    assert state.scaler["scale"] == 2.0**15  # halved once
    assert all(torch.isfinite(t).all() for t in tensors(config.run, 3).values())


def test_fp16_that_overflows_at_every_scale_says_so(settings, monkeypatch):
    run = prepare(settings(mixed_precision="fp16"))
    loss = type(run.objective).__call__
    monkeypatch.setattr(type(run.objective), "__call__", lambda *a: loss(*a) * float("inf"))
    with pytest.raises(UserError, match="overflow fp16 at every loss scale; use --mixed-prec"):
        distill(run)


def test_sigterm_saves_and_the_resumed_run_is_the_uninterrupted_one(settings, repo):
    flags = {"max_train_steps": 40, "checkpointing_steps": 1000, "logging_steps": 1}
    whole = settings("whole", **flags)
    train(whole)
    config = settings("run", resume_from_checkpoint="latest", **flags)
    assert end_after(config, 3, 0, repo, signal.SIGTERM) == 0
    saved = [path.name for path in checkpoint.whole_checkpoints(config.run)]
    assert len(saved) == 1
    assert saved != ["step-00000040"], "it ended before it was stopped: give it more steps"
    assert not list(config.run.glob("*.safetensors"))  # nothing exported of half a run
    train(config)
    assert_same_run(whole.run, config.run, 40)


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
