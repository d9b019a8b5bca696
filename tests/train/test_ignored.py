"""Nothing is accepted and ignored: what a run does not read is refused, by table and in fact."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from shared.cli.config import parse
from shared.errors import UserError
from train.config import DistillConfig
from train.flags import NOT_WITH, ONLY_WITH, check_flags, dashed, flags_of
from train.networks.precision import check_speed
from train.objectives import OBJECTIVES
from train.state.checkpoint import TrainingState
from train.trainer.distributed import as_launched
from train.trainer.loop import distill
from train.trainer.plan import batches
from train.trainer.setup import prepare

BASE = ["--model", "tiny-sd", "--cache", "c", "--run", "r"]
KINDS = [(objective, student) for objective in OBJECTIVES for student in ("lora", "full")]
# Refused for their value; all others also for the default one.
SOME = {"hub_model_id": "owner/name", "hub_token": "secret"}


def parsed(*words: str) -> DistillConfig:
    return parse(DistillConfig, [*BASE, *words], "prog")


def refusal(config: DistillConfig) -> str:
    """What the checks say, nothing if they take it."""
    try:
        check_flags(config)
        check_speed(config, torch.device("cuda"))
    except UserError as error:
        return str(error)
    return ""


class Watched(DistillConfig):
    """Notes which flags are read by what trains; checks and copies do not count."""

    read: ClassVar[set[str]] = set()

    def __getattribute__(self, name):
        caller = sys._getframe(1).f_code
        copying = caller.co_filename == dataclasses.__file__
        if not copying and not caller.co_name.startswith("check_"):
            Watched.read.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize(("objective", "student"), KINDS)
def test_what_a_run_does_not_read_is_refused(tiny_sd, tiny_cache, tmp_path, objective, student):
    torch.set_num_threads(1)
    Watched.read = set()
    config = Watched(
        model=str(tiny_sd), cache=tiny_cache, run=tmp_path / "run", objective=objective,
        student=student, max_train_steps=1, train_batch_size=2, lora_rank=2, threads=1,
        fake_warmup_steps=0, fake_updates=1,
    )  # fmt: skip
    run = prepare(config)
    run.previews = None  # which would only take time
    distill(run)
    flags = {field.name for field in dataclasses.fields(DistillConfig)} - {"typed"}
    unread = flags - Watched.read
    assert {"seed", "learning_rate", "max_grad_norm", "logging_steps"} <= Watched.read
    plain = DistillConfig(
        "tiny-sd", Path("c"), Path("r"), objective=objective, student=student
    )  # which the checks take
    check_flags(plain)
    for name in unread:
        value = SOME.get(name, getattr(plain, name))
        typed = dataclasses.replace(plain, typed=frozenset({name}), **{name: value})
        assert dashed(name) in refusal(typed)
    assert unread >= {"lr_power", "lr_num_cycles", "hub_token"}  # it does find some
    adapters = student == "lora" or objective == "dmd"  # whose fake score has some
    assert ("lora_alpha" in unread) == (not adapters)
    assert ("ema_decay" in unread) == (objective in ("denoise", "dmd") or student == "lora")
    assert ("gan_weight" in unread) == (objective != "dmd")
    assert ("num_phases" in unread) == (objective != "pcm")
    assert ("target_steps" in unread) == (objective != "tcd")


IGNORED = [
    (["--ema-decay", "0.95"], "--ema-decay is for --student full and means nothing to --student "
                              "lora; leave it out"),
    (["--guidance-init=zero"], "--guidance-init is for --student full"),
    (["--unet_time_cond_proj_dim", "256"], "--unet-time-cond-proj-dim is for --student full"),
    (["--no-offload-ema"], "--offload-ema is for --student full"),
    (["--student", "full", "--lora-rank", "64"], "--lora-rank is for --student lora"),
    (["--student", "full", "--lora-alpha", "64"], "--lora-alpha is for --student lora"),
    (["--student", "full", "--lora-dropout", "0"], "--lora-dropout is for --student lora"),
    (["--student", "full", "--lora-target-modules", "to_q"], "--lora-target-modules is for"),
    (["--loss-type", "l2", "--huber-c", "0.001"], "--huber-c is for --loss-type huber"),
    (["--objective", "denoise", "--huber-c", "0.001"], "--huber-c is for --objective lcd"),
    (["--objective", "denoise", "--w-min", "3"], "--w-min is for --objective lcd"),
    (["--noise-offset", "0"], "--noise-offset is for --objective denoise"),
    (["--lr-power", "1"], "--lr-power is for --lr-scheduler polynomial"),
    (["--num-train-epochs", "2", "--max-train-steps", "1000"], "exclude each other"),
    (["--validation-prompts", "a", "--validation-steps", "0"],
     "--validation-prompts means nothing beside --validation-steps 0"),
    (["--report-to", "none", "--logging-dir", "x"], "--logging-dir means nothing beside"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), IGNORED, ids=lambda value: str(value[0]))
def test_typed_with_any_value_it_is_refused(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_flags(parsed(*words))


def test_typed_in_a_file_it_is_refused_as_well(tmp_path):
    (tmp_path / "run.toml").write_text("lora-rank = 64\nseed = 0\n")
    config = parsed("--student", "full", "--config", str(tmp_path / "run.toml"))
    assert config.typed == {"model", "cache", "run", "student", "lora_rank", "seed"}
    with pytest.raises(UserError, match="--lora-rank is for --student lora"):
        check_flags(config)


@pytest.mark.parametrize("words", [
    ["--student", "full", "--ema-decay", "0.95", "--mixed-precision", "bf16", "--offload-ema"],
    ["--lora-rank", "8", "--lr-scheduler", "polynomial", "--lr-power", "2"],
    ["--objective", "denoise", "--snr-gamma", "5", "--lora-alpha", "4", "--max-grad-norm", "0"],
    ["--validation-steps", "0", "--report-to", "none", "--num-train-epochs", "1"],
])  # fmt: skip
def test_what_means_something_is_taken(words):
    check_flags(parsed(*words))


def test_what_was_typed_is_no_setting(tmp_path):
    """It is neither a flag nor in a file, nor among the settings of a run that are kept."""
    from shared.cli.config import to_dict

    assert "typed" not in json.dumps(to_dict(DistillConfig("m", Path("c"), Path("r"))))
    (tmp_path / "run.toml").write_text('typed = ["seed"]\n')
    with pytest.raises(UserError, match="no such setting: typed"):
        parsed("--config", str(tmp_path / "run.toml"))
    with pytest.raises(UserError, match="--typed is unknown"):
        parsed("--typed", "seed")


def test_what_was_typed_wins_over_the_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    words = ["--mixed-precision", "no", "--gradient-accumulation-steps", "1"]
    told = as_launched(parsed(*words))
    assert (told.mixed_precision, told.gradient_accumulation_steps) == ("no", 1)
    told = as_launched(parsed())
    assert (told.mixed_precision, told.gradient_accumulation_steps) == ("bf16", 4)


def test_accumulation_beside_a_global_batch(capsys):
    """Refused beside --global-batch-size where they disagree; a resumed run says what it does."""
    distributed, words = SimpleNamespace(world=2, main=True), ["--train-batch-size", "4"]
    global_batch = [*words, "--global-batch-size", "16"]
    three = ["--gradient-accumulation-steps", "3"]
    assert batches(parsed(*words, *three), distributed, 1, None) == (24, 3)
    assert batches(parsed(*global_batch), distributed, 1, None) == (16, 2)
    with pytest.raises(UserError, match="--global-batch-size 16 is 2 of them here; give one"):
        batches(parsed(*global_batch, *three), distributed, 1, None)
    assert capsys.readouterr().err == ""
    before = TrainingState(1, 48, 48, {})
    assert batches(parsed(*words, *three), distributed, 1, before) == (48, 6)
    said = capsys.readouterr().err
    assert said.startswith("note: 6 accumulation steps instead of --gradient-accumulation-steps 3:")
    assert said.count("\n") == 1


def test_the_docs_have_this_table(repo):
    """Every line of it, and no other."""
    text = (repo / "docs" / "flags.md").read_text()
    section = text.partition("## Flags that mean something only with others\n")[2]
    rows = re.findall(r"^\| (`--[^|]+) \| ([^|]+) \|$", section.partition("\n## ")[0], re.M)
    written = [(say, flag) for flags, say in rows for flag in re.findall(r"`(--[\w-]+)`", flags)]
    wanted = []
    objectives = {("objective", name): flags_of(OBJECTIVES[name]) for name in OBJECTIVES}
    for words, table in (("only with", ONLY_WITH | objectives), ("not with", NOT_WITH)):
        for (flag, value), names in table.items():
            shown = value[0] if isinstance(value, tuple) else value
            wanted += [(f"{words} `{dashed(flag)} {shown}`", dashed(name)) for name in names]
    assert sorted(written) == sorted(wanted)
