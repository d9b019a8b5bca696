"""What is typed besides flags: commands, statuses, files of settings, completion."""

import json
import os
import subprocess

import pytest

from tests.conftest import ROOT
from tests.support import warm

USAGE = [
    ("prep", ["encodee"], "did you mean encode?"),
    ("train", ["distil"], "did you mean distill?"),
    ("prep", ["xyz"], "choose encode, synthesize, teach, finish"),
    ("prep", ["encode", "--cach", "c"], "--cach is unknown; did you mean --cache?"),
    ("train", ["evaluate", "--eval-cash=c"], "did you mean --eval-cache?"),
    ("train", ["distill", "--max-train-steps", "0"], "must be at least 1"),
    ("train", ["distill", "--cache-dir", "x"], "HF_HUB_CACHE"),
    ("train", ["distill", "--run", "s3://b/r"], "is a URL, not a path of this machine"),
    ("train", ["distill", "--student", "full", "--lora-rank", "4"], "--lora-rank is for"),
    ("train", ["distill", "--config"], "wants the path"),
    ("train", ["distill", "--config", "a", "--config", "b"], "given twice"),
    ("prep", ["encode", "--keep-tokens", "0"], "--keep-tokens needs --shuffle-caption"),
    ("prep", ["encode", "--shuffle-caption"], "such as --max-captions 8"),
    ("prep", ["encode", "--shuffle-caption", "--max-captions", "2", "--caption-separator", ""],
     "--caption-separator is empty"),
    ("prep", ["--print-completion", "csh"], "not one of bash, zsh, fish"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "words", "said"), USAGE, ids=lambda value: str(value)[:40])
def test_usage_errors_have_one_status(cli, tmp_path, tiny_cache, monkeypatch, stage, words, said):
    monkeypatch.chdir(tmp_path)
    base = {"encode": ["--shards", ROOT / "data/pictures/train/00000.tar", "--model", "tiny-sd",
                       "--cache", "new"],
            "distill": ["--model", "tiny-sd", "--cache", tiny_cache, "--run", "r"]}  # fmt: skip
    answer = cli(stage, *words[:1], *base.get(words[0], []), *words[1:])
    assert answer.status == 2, answer
    line, *more = answer.err.splitlines()
    assert more == []
    assert line.startswith("error: ")
    assert said in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stage", ["prep", "train", "infer"])
def test_version_and_help(cli, stage):
    answer = cli(stage, "--version")
    assert answer.status == 0
    assert answer.out.startswith("latent-distillery ")
    command = {"prep": "encode", "train": "distill", "infer": "draw"}[stage]
    assert cli(stage, command, "--version") == answer
    assert "--print-completion bash|zsh|fish" in cli(stage, "--help").out


@pytest.fixture
def dry(cli, tiny_cache, tmp_path):
    """`train distill --config FILE --dry-run` with this text in the file."""

    def run(name: str, text: str, *words):
        (tmp_path / name).write_text(text, "utf-8")
        return cli("train", "distill", "--dry-run", "--config", tmp_path / name, *words)

    return run


def test_json_works_as_toml_does(dry, tiny_cache, tmp_path):
    settings = {"model": "tiny-sd", "cache": str(tiny_cache), "run": str(tmp_path / "r"),
                "lora-rank": 2, "max_train_steps": 7, "validation_steps": 0, "vae": None,
                "report_to": ["none"]}  # fmt: skip
    for text in (json.dumps(settings), "\ufeff" + json.dumps(settings, indent=1)):
        answer = dry("x.json", text)
        assert answer.status == 0, answer.err
        assert "7 steps of 8 samples" in answer.err
    assert "5 steps of" in dry("x.json", json.dumps(settings), "--max-train-steps", 5).err


MISTAKES = [
    ("x.json", "[1]", "holds a list"),
    ("x.json", '{"seed": ', "Expecting value"),
    ("x.json", '{"seed": "one"}', "seed = 'one' is not of type"),
    ("x.json", '{"lora_rnk": 4}', "no such setting: lora_rnk; did you mean lora_rank?"),
    ("x.json", '{"rank": 4, "lora_rank": 4}', "are one setting here; give one"),
    ("x.json", '{"train": {"seed": 1}}', "[train] is a section"),
    ("x.json", "[" * 100_000, "x.json: "),
    ("x.toml", "[general]\nshuffle_caption = true\n", "[general] is a section"),
    ("x.toml", "[[datasets]]\nresolution = 512\n", "subset's image_dir is one of `prep encode`'s"),
    ("x.toml", "xformers = 1\n", "xformers is a switch, true or false"),
    ("x.toml", "network_dim = 0\n", "--lora-rank 0 must be at least 1"),
    ("x.yaml", "seed: 1\n", "TOML (name = value) or JSON"),
    ("x.json", '{"distributed_type": "NO"}', "accelerate launch --config_file"),
    ("x.yml", "compute_environment: LOCAL_MACHINE\n", "accelerate launch --config_file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "said"), MISTAKES, ids=lambda value: str(value)[:30])
def test_mistakes_in_files(dry, tmp_path, tiny_cache, name, text, said):
    words = ["--model", "tiny-sd", "--cache", tiny_cache, "--run", tmp_path / "r"]
    answer = dry(name, text, *words)
    assert answer.status == 2, answer
    assert answer.err.count("\n") == 1
    assert said in answer.err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("distillery-prep ver", ["verify"]),
        ("distillery-prep encode --cach", ["--cache"]),
        ("distillery-train distill --lora-ra", ["--lora-rank"]),
        ("distillery-train distill --ty", []),  # a field that is no flag
    ],
)
def test_bash_completes(tmp_path, line, completed):
    """By the script that the command prints, in a bash of its own."""
    program = line.split()[0]
    stage = program.removeprefix("distillery-")
    script = warm.run(["-m", stage, "--print-completion", "bash"], tmp_path).stdout
    (tmp_path / "script").write_text(script)
    words = line.split()
    asked = (
        f"source ./script; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        f"$(complete -p {program} | sed 's/.*-F \\([^ ]*\\).*/\\1/'); printf '%s\\n' "
        '"${COMPREPLY[@]}"'
    )
    found = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.split() == completed, found.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script(cli, shell):
    answer = cli("train", "--print-completion", shell)
    assert answer.status == 0
    assert "distillery-train" in answer.out
    assert "--lora-rank" in answer.out
