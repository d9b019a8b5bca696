"""`train distill` as people type it: mistakes end in one line, flags and TOML in one place."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def words(tiny_cache, tmp_path):
    """A run of one step; later flags win."""
    return [
        "distill", "--model", "tiny-sd", "--cache", tiny_cache, "--run", tmp_path / "run",
        "--max-train-steps", 1, "--train-batch-size", 2, "--lora-rank", 2, "--threads", 1,
        "--validation-steps", 0,
    ]  # fmt: skip


@pytest.fixture
def refused(cli, tmp_path):
    """The one line with which a command is refused."""

    def run(*words) -> str:
        answer = cli("train", *words)
        line, *more = answer.err.splitlines()[-1:] or [""]
        assert not more
        assert answer.status in (1, 2), answer  # 2: the command line cannot be understood
        assert line.startswith("error: "), answer.err
        assert "Traceback" not in answer.err
        return line

    return run


def config_of(run) -> dict:
    return json.loads((run / "config.json").read_text())


@pytest.mark.slow
def test_a_mistake_is_one_line_and_nothing_else(repo, tmp_path):
    """The real command, once: what reaches the terminal and the shell."""
    cache = tmp_path / "caches" / "mistyped"
    command = [sys.executable, "-m", "train", "distill", "--model", "tiny-sd", "--cache", cache]
    answer = subprocess.run(
        [*map(str, command), "--run", str(tmp_path / "run")], cwd=repo, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(repo)},
    )  # fmt: skip
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr == (
        f"error: {cache} is not a cache (no manifest.json); "
        f"`prep encode --cache {cache}` makes one\n"
    )
    assert not (tmp_path / "run").exists()


def test_unknown_command(refused):
    assert refused("distil") == (
        "error: 'distil' is not a command of python -m train; did you mean distill? "
        "There are distill, evaluate, compare, sample, export"
    )


def test_no_command_lists_them(cli):
    for words, status in (((), 2), (("--help",), 0)):
        answer = cli("train", *words)
        assert answer.status == status
        for command in ("distill", "evaluate", "sample", "export"):
            assert f"\n  {command} " in answer.out


def test_help_explains_the_flags(cli):
    answer = cli("train", "distill", "--help")
    assert answer.status == 0
    for flag in ("--learning-rate", "--num-ddim-timesteps", "--resume-from-checkpoint", "--w-min"):
        assert flag in answer.out
    assert "latest" in answer.out


MISTAKES = [
    (["--model", "tiny-xl"], ["family is tiny-sd", "wants tiny-xl", "encode anew"]),
    (["--model", "tinysd"], ["'tinysd'", "tiny-sd", "hub id"]),
    (["--model", "./nowhere"], ["'./nowhere'", "neither a folder"]),
    (["--cache", "nowhere"], ["nowhere is not a cache", "prep encode"]),
    (["--max-train-steps", "0"], ["--max-train-steps 0 must be at least 1"]),
    (["--train-batch-size", "-2"], ["--train-batch-size -2 must be at least 1"]),
    (["--num-ddim-timesteps", "7"], ["--num-ddim-timesteps 7", "1000"]),
    (["--num-ddim-timesteps", "0"], ["--num-ddim-timesteps"]),
    (["--num-ddim-timesteps", "-50"], ["--num-ddim-timesteps"]),
    (["--w-min", "9", "--w-max", "3"], ["--w-min 9 is above --w-max 3"]),
    (["--seed", "-5"], ["--seed"]),
    (["--threads", "-3"], ["--threads"]),
    (["--device", "banana"], ["--device"]),
    (["--resume-from-checkpoint", "nowhere"], ["nowhere: not a whole checkpoint"]),
    (["--validation-steps", "1", "--validation-prompts", "a nice dog"],
     ["'a nice dog'", "python -m prep embed"]),
    (["--config", "nowhere.toml"], ["nowhere.toml", "such file"]),
    (["--config", "."], ["--config ."]),
    (["--config"], ["--config wants the path"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "parts"), MISTAKES, ids=[" ".join(change) for change, _ in MISTAKES]
)
def test_mistakes_in_flags(refused, words, change, parts, tmp_path):
    line = refused(*words, *change)
    for part in parts:
        assert part in line
    assert not list((tmp_path / "run").glob("*.jsonl"))


def test_a_cuda_device_that_is_not_here(refused, words):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert refused(*words, "--device", "cuda") == (
        "error: --device cuda: no CUDA device here; use --device cpu or auto"
    )


def test_an_unknown_flag_names_itself(cli, words):
    answer = cli("train", *words, "--learning-rat", "1")
    assert answer.status == 2
    assert "--learning-rat" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(("flag", "value"), [("--student", "medium"), ("--max-train-steps", "ten")])
def test_a_wrong_value_names_its_flag(cli, words, flag, value):
    answer = cli("train", *words, flag, value)
    assert answer.status == 2
    assert flag in answer.err
    assert value in answer.err


def test_an_unfinished_cache_says_so(refused, words, tiny_cache, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_cache, copy)
    (copy / "manifest.json").unlink()
    assert "is unfinished: run the same `prep encode`" in refused(*words, "--cache", copy)


def test_a_run_folder_that_is_a_file(refused, words, tmp_path):
    (tmp_path / "run").write_text("")
    assert "is a file, not a folder" in refused(*words)


def test_a_cache_by_another_vae_is_refused_for_previews(refused, words, tiny_cache, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_cache, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["identity"]["vae"]["fingerprint"] = "0" * 16
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "another VAE" in refused(*words, "--cache", copy, "--validation-steps", 1)


def test_dry_run_checks_and_writes_nothing(cli, refused, words, tmp_path, tiny_cache):
    before = sorted(tiny_cache.rglob("*"))
    answer = cli("train", *words, "--dry-run", "--validation-steps", 1, "--max-train-steps", 500)
    assert (answer.status, answer.out) == (0, "")
    assert "500 steps of 2 samples, 13.9 passes over 72 samples" in answer.err
    assert not (tmp_path / "run").exists()
    assert sorted(tiny_cache.rglob("*")) == before
    assert "family" in refused(*words, "--dry-run", "--model", "tiny-xl")  # it does check


def test_a_run_from_the_command_line(cli, words, tmp_path):
    """Dashes and underscores alike; what is left is complete."""
    answer = cli("train", *words, "--lora_alpha", 3, "--logging-steps", "1", "--validation_steps=1",
                 "--checkpoints_total_limit", 1)  # fmt: skip
    run = tmp_path / "run"
    assert answer.status == 0, answer.err
    assert answer.out == f"student: {run / 'pytorch_lora_weights.safetensors'}\n"
    assert (run / "previews" / "step-00000001.png").stat().st_size > 1000
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert any((run / "logs" / "latent-distillery").glob("events.*"))
    config = config_of(run)
    assert (config["lora_alpha"], config["lora_rank"], config["max_train_steps"]) == (3, 2, 1)
    assert config["learning_rate"] == 1e-4  # resolved, not null
    assert not list((run / "tmp").iterdir())


def test_toml_holds_any_flag_and_the_command_line_wins(cli, tiny_cache, tmp_path):
    run = tmp_path / "run"
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'model = "tiny-sd"\ncache = "{tiny_cache}"\nrun = "{run}"\nstudent = "lora"\n'
        "lora-rank = 2\nmax_train_steps = 5\ntrain-batch-size = 2\nvalidation_steps = 0\n"
        'learning_rate = 5e-4\nthreads = 1\nreport_to = ["none", "none"]\n'
    )
    answer = cli("train", "distill", "--max-train-steps", 1, "--config", toml)
    assert answer.status == 0, answer.err
    config = config_of(run)
    assert config["max_train_steps"] == 1  # the command line
    assert (config["lora_rank"], config["learning_rate"]) == (2, 5e-4)  # the file
    assert (config["seed"], config["huber_c"]) == (0, 1e-3)  # the defaults
    assert config["report_to"] == ["none", "none"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rat = 1", ["no such setting: learning_rat"]),
        ("seed = = 1", ["run.toml", "line 1"]),
        ('train_batch_size = "eight"', ["train_batch_size", "eight"]),
        ("max_train_steps = 2.5", ["max_train_steps", "2.5"]),
        ('student = "medium"', ["student", "medium"]),
        ("dry_run = 3", ["dry_run", "3"]),
        ("model = 3", ["model", "3"]),
        ('validation_prompts = "a red circle"', ["validation_prompts", "a red circle"]),
    ],
)
def test_mistakes_in_toml(refused, words, tmp_path, text, parts):
    toml = tmp_path / "run.toml"
    toml.write_text(f"{text}\n")
    keep = words if "model" not in text else [w for w in words if w not in ("--model", "tiny-sd")]
    name = text.partition(" ")[0].replace("_", "-")
    if f"--{name}" in keep:  # the file's value must not be hidden by the flag's
        at = keep.index(f"--{name}")
        keep = keep[:at] + keep[at + 2 :]
    line = refused(*keep, "--dry-run", "--config", toml)
    for part in parts:
        assert part in line
    assert "run.toml" in line


def test_toml_that_is_not_text(refused, words, tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe\x00")
    assert "run.toml" in refused(*words, "--config", tmp_path / "run.toml")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_cache):
    """A finished run, and the folder of a cache of its own."""
    from train.config import DistillConfig
    from train.trainer.loop import distill
    from train.trainer.setup import prepare

    folder = tmp_path_factory.mktemp("run")
    distill(prepare(DistillConfig(
        model="tiny-sd", cache=tiny_cache, run=folder, max_train_steps=1, train_batch_size=2,
        lora_rank=2, validation_steps=0, threads=1, num_ddim_timesteps=20,
    )))  # fmt: skip
    return folder
