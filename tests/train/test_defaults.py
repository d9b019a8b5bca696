"""The commands as the README types them, with nothing but the model said."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.cache.conditioning import load_conditioning
from shared.cache.paths import CachePaths
from shared.cli.defaults import default_cache
from shared.errors import UserError
from train.config import DistillConfig
from train.export.newest_run import newest_student
from train.trainer import defaults
from train.trainer.defaults import own_precision, run_name, with_defaults

OURS = {"model": "tiny-sd", "cache": "caches/tiny-sd", "run": "runs/mine"}  # of every config.json

FEW = (
    "--max-train-steps", 1, "--train-batch-size", 2, "--lora-rank", 2, "--threads", 1,
    "--validation-steps", 0,
)  # fmt: skip


@pytest.fixture
def here(tiny_cache, tmp_path, monkeypatch):
    """A folder in which `prep encode --model tiny-sd` was run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_cache, tmp_path / "caches" / "tiny-sd")
    return tmp_path


def set_aside(cli, count: int) -> None:
    words = ("--cache", "caches/tiny-sd", "--holdout", count, "--no-report")
    assert cli("prep", "finish", *words).status == 0


@pytest.mark.slow  # an evaluation
def test_train_evaluate_sample_and_export_find_what_they_need(cli, here):
    set_aside(cli, 66)
    answer = cli("train", "distill", "--model", "tiny-sd", *FEW)
    assert answer.status == 0, answer.err
    (run,) = Path("runs").iterdir()
    first = answer.err.splitlines()[0]
    for said in ("model tiny-sd", "cache caches/tiny-sd", f"run {run}", "precision no"):
        assert said in first
    assert "over 6 samples" in answer.err  # without those that are held out

    answer = cli("train", "evaluate", "--num-samples", 65, "--threads", 1)
    assert answer.status == 0, answer.err
    assert f"run {run}, the newest" in answer.err.splitlines()[0]
    assert "66 samples held out of caches/tiny-sd" in answer.err
    assert json.loads((run / "evaluation.json").read_text())["num_samples"] == 65

    answer = cli("train", "sample", "--threads", 1)
    assert answer.status == 0, answer.err
    assert Path("sample.png").is_file()
    assert f"run {run}, the newest" in answer.err

    (run / "pytorch_lora_weights.safetensors").unlink()
    answer = cli("train", "export")
    assert answer.status == 0, answer.err
    assert (run / "pytorch_lora_weights.safetensors").is_file()


def test_a_run_is_not_judged_by_what_was_set_aside_after_it(cli, here):
    assert cli("train", "distill", "--model", "tiny-sd", *FEW).status == 0
    line = cli("train", "evaluate", "--threads", 1).err.splitlines()[-1]
    assert "has no samples set aside" in line
    assert "python -m prep finish --cache caches/tiny-sd --holdout 1000" in line
    set_aside(cli, 66)
    for words in ((), ("--eval-cache", "caches/tiny-sd")):
        answer = cli("train", "evaluate", "--threads", 1, *words)
        assert answer.status == 1
        assert "may have been trained on the samples" in answer.err.splitlines()[-1]


def test_a_resume_keeps_to_the_samples_it_was_trained_on(cli, here):
    words = ("distill", "--model", "tiny-sd", "--resume-from-checkpoint", "latest", *FEW)
    assert cli("train", *words).status == 0
    set_aside(cli, 8)
    answer = cli("train", *words, "--max-train-steps", 2, "--run", next(Path("runs").iterdir()))
    assert answer.status == 1
    assert "belongs to another run: cache" in answer.err


def test_the_newest_student_is_drawn_not_the_newest_folder(here, monkeypatch, capsys):
    for age, name in enumerate(("late", "early", "unfinished")):
        folder = here / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**OURS, "student": "lora"}))
        if name != "unfinished":
            (folder / "pytorch_lora_weights.safetensors").touch()
            os.utime(folder / "pytorch_lora_weights.safetensors", (1000 - age,) * 2)
    (here / "runs" / "broken").mkdir()
    (here / "runs" / "broken" / "config.json").write_text("{")
    assert newest_student(None) == Path("runs/late")
    assert "run runs/late, the newest of runs/ (--run chooses another)" in capsys.readouterr().err
    assert newest_student(Path("mine")) == Path("mine")
    assert capsys.readouterr().err == ""
    shutil.rmtree("runs")
    with pytest.raises(UserError, match="no run in runs/ has a student yet"):
        newest_student(None)


# --- names --------------------------------------------------------------------------------------


def config(**flags) -> DistillConfig:
    return DistillConfig(**{"model": "sdxl", "cache": default_cache("sdxl"), **flags})


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, "sdxl-lora"),
        ({"student": "full"}, "sdxl-full"),
        ({"lora_rank": 64, "seed": 0}, "sdxl-lora"),  # as it would be anyway
        ({"lora_rank": 8}, "sdxl-lora-lora-rank-8"),
        ({"learning_rate": 2e-5, "seed": 3}, "sdxl-lora-seed-3-learning-rate-2e-05"),
        ({"cache": Path("caches/cats")}, "sdxl-lora-cats"),
        ({"objective": "denoise"}, "sdxl-lora-objective-denoise"),
        # What makes no other student makes no other run.
        ({"threads": 3, "device": "cuda:1", "mixed_precision": "fp16", "report_to": ("none",),
          "checkpointing_steps": 7, "resume_from_checkpoint": "latest", "dry_run": True,
          "typed": frozenset({"threads"})}, "sdxl-lora"),
    ],
)  # fmt: skip
def test_a_run_is_named_by_what_is_not_as_usual(flags, name):
    assert run_name(config(**flags)) == name


def test_other_flags_make_another_run_and_the_same_the_same():
    values = [
        {}, {"seed": 1}, {"seed": 11}, {"learning_rate": 1e-5}, {"lora_rank": 1}, {"w_min": 3.0},
        {"max_train_steps": 10}, {"cache": Path("elsewhere/cats")}, {"cache": Path("caches/cats")},
        {"lora_target_modules": "to_q,to_k"}, {"lora_target_modules": "to_q.to_k"},
        {"student": "full"}, {"student": "full", "ema_decay": 0.9}, {"use_8bit_adam": True},
    ]  # fmt: skip
    names = [run_name(config(**flags)) for flags in values]
    assert len(set(names)) == len(values)
    assert names == [run_name(config(**flags)) for flags in values]
    assert all("/" not in name for name in names)


def test_many_flags_make_a_name_of_bounded_length():
    many = {"lora_rank": 8, "seed": 7, "learning_rate": 3e-4, "w_min": 1.0, "w_max": 2.0,
            "max_grad_norm": 0.5, "adam_beta1": 0.8, "huber_c": 0.01}  # fmt: skip
    name = run_name(config(**many))
    assert len(name) <= defaults.LONGEST
    assert name.startswith("sdxl-lora-")
    assert name != run_name(config(**{**many, "seed": 8}))


# --- models and caches --------------------------------------------------------------------------


def test_the_model_of_a_named_cache(here, tiny_sd, capsys):
    cache = Path("caches/tiny-sd")
    config = with_defaults(DistillConfig(cache=cache, device="cpu"))
    assert (config.model, config.run) == ("tiny-sd", Path("runs/tiny-sd-lora"))
    manifest = cache / "manifest.json"
    stored = json.loads(manifest.read_text())
    for recorded, model in (("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"), (".", ".")):
        stored["identity"]["model"] = recorded
        manifest.write_text(json.dumps(stored))
        assert with_defaults(DistillConfig(cache=cache, device="cpu")).model == model
    stored["identity"]["model"] = "someone/elses"  # never asked of the hub unless typed
    manifest.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"made for 'someone/elses'; pass that, .* as --model"):
        with_defaults(DistillConfig(cache=cache, device="cpu"))


def test_a_cache_that_is_not_there_yet_is_answered_with_those_that_are(cli, here):
    answer = cli("train", "distill")
    assert answer.status == 1
    assert answer.err == (
        "error: there is no cache caches/sdxl yet; `python -m prep encode --model sdxl --shards "
        "...` makes it; or pass --cache: there is caches/tiny-sd\n"
    )


def test_prep_names_its_cache_after_the_model(cli, tmp_path, monkeypatch, repo):
    monkeypatch.chdir(tmp_path)
    shards = repo / "data" / "pictures" / "heldout" / "00000.tar"
    (tmp_path / "models").mkdir()
    shutil.copytree(repo / "data" / "tiny-sd", tmp_path / "models" / "mine")
    answer = cli("prep", "encode", "--shards", shards, "--model", "models/mine/", "--dry-run")
    assert answer.status == 0, answer.err
    assert answer.err.startswith("model models/mine/, cache caches/mine (--model and --cache")


# --- files of settings --------------------------------------------------------------------------


def test_a_file_of_settings_alone(cli, here):
    settings = {"model": "tiny-sd", "run": "runs/mine", "mixed_precision": "bf16", "threads": 1,
                "max_train_steps": 1, "lora_rank": 2, "dry_run": True}  # fmt: skip
    Path("run.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
    answer = cli("train", "distill", "--config", "run.toml")
    assert answer.status == 0, answer.err
    assert "model tiny-sd, cache caches/tiny-sd, run runs/mine, precision bf16" in answer.err


# --- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "has_bf16", "precision"),
    [("cuda", True, "bf16"), ("cuda", False, "fp16"), ("cpu", True, "no"), ("mps", True, "no")],
)
def test_precision_is_the_devices(monkeypatch, kind, has_bf16, precision):
    monkeypatch.setattr(defaults, "pick_device", lambda _: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert own_precision(config()) == precision


def test_a_given_precision_wins_and_a_run_keeps_its_own(here, monkeypatch, capsys):
    monkeypatch.setattr(defaults, "own_precision", lambda _: "bf16")
    plain = DistillConfig(model="tiny-sd", cache=Path("caches/tiny-sd"), run=here / "run")
    assert with_defaults(plain).mixed_precision == "bf16"
    assert "precision bf16 (--mixed-precision chooses another)" in capsys.readouterr().err
    assert with_defaults(replace(plain, mixed_precision="no")).mixed_precision == "no"
    (here / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (here / "run" / "config.json").write_text(json.dumps({**OURS, "mixed_precision": "fp16"}))
    assert with_defaults(plain).mixed_precision == "fp16"
    assert with_defaults(replace(plain, mixed_precision="no")).mixed_precision == "no"
    other = replace(plain, run=here / "new")
    assert with_defaults(other).mixed_precision == "bf16"
    checkpoint = str(here / "run" / "checkpoints" / "step-00000001")
    resumed = with_defaults(replace(other, resume_from_checkpoint=checkpoint))
    assert resumed.mixed_precision == "fp16"


@pytest.mark.parametrize(("launched", "precision"), [("fp16", "fp16"), ("no", "bf16")])
def test_a_launcher_is_heard_where_it_was_told_something(here, monkeypatch, launched, precision):
    monkeypatch.setattr(defaults, "own_precision", lambda _: "bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    plain = DistillConfig(model="tiny-sd", cache=Path("caches/tiny-sd"), run=here / "run")
    assert with_defaults(plain).mixed_precision == precision


def test_of_several_processes_one_speaks(here, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with_defaults(DistillConfig(model="tiny-sd", device="cpu"))
    assert capsys.readouterr().err == ""


def test_prompts_are_those_of_the_previews(here):
    from train.config import RunConfig, SampleConfig
    from train.evaluation.sample_command import with_prompts

    conditioning = load_conditioning(CachePaths(here / "caches" / "tiny-sd").conditioning)
    none = RunConfig("m", here, here)
    own = replace(none, validation_prompts=("a cat",))
    assert with_prompts(SampleConfig(), own, conditioning).prompt == ("a cat",)
    some = with_prompts(SampleConfig(), none, conditioning).prompt
    assert some == conditioning.prompts[:4]
    given = SampleConfig(prompt=("a dog",))
    assert with_prompts(given, own, conditioning).prompt == ("a dog",)
