"""What the trainer advises where memory is short: only what it would take itself."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shared.cli.config import parse
from shared.errors import UserError
from shared.wording import size_of
from train.config import DistillConfig
from train.flags import check_flags
from train.memory.advice import apply, ladder, memory_line, words
from train.memory.estimate import ALONE, Parallelism, estimate
from train.networks.precision import check_speed
from train.state.resume_checks import divide
from train.trainer.plan import batches

SIZE = (8, 8)
DDP, FSDP = Parallelism(4), Parallelism(4, fsdp=True)
BASE = ["--model", "tiny-sd", "--cache", "c", "--run", "r"]
TYPED = [
    [],
    ["--student", "full"],
    ["--student", "full", "--ema-decay", "0.9", "--mixed-precision", "bf16", "--offload-ema"],
    ["--student", "full", "--mixed-precision", "no", "--gradient-accumulation-steps", "2"],
    ["--student", "full", "--objective", "denoise", "--snr-gamma", "5"],
    ["--objective", "denoise", "--lora-rank", "8", "--gradient-checkpointing"],
    ["--student", "full", "--global-batch-size", "64", "--use-8bit-adam"],
    ["--student", "full", "--train-batch-size", "1", "--mixed-precision", "fp16"],
]


def check(config: DistillConfig, parallelism: Parallelism) -> None:
    """As `train.trainer.setup.prepare` does."""
    check_flags(config)
    check_speed(config, torch.device("cuda"), parallelism.fsdp)
    batches(config, SimpleNamespace(world=parallelism.world, main=True), 1, None)


@pytest.mark.parametrize("parallelism", [ALONE, DDP, FSDP], ids=["alone", "ddp", "fsdp"])
@pytest.mark.parametrize("typed", TYPED, ids=" ".join)
def test_every_advice_is_taken(typed, parallelism):
    """The words that are printed, typed after the user's own."""
    config = parse(DistillConfig, [*BASE, *typed], "prog")
    try:
        check(config, parallelism)
    except UserError:
        assert parallelism.fsdp  # which refuses --offload-ema and --use-8bit-adam
        return
    students = set()
    told = config_of_run(config, parallelism)
    for change in both(told, parallelism):
        changed, left_out = apply(told, change)
        advice, _, without = words(change, left_out).partition(" and without ")
        kept = drop(typed, without.split())
        again = parse(DistillConfig, [*BASE, *kept, *advice.split()], "prog")
        check(again, parallelism)
        seen = {name: getattr(again, name) for name in change}
        assert seen == change
        assert again.train_batch_size == changed.train_batch_size
        students.add(again.student)
    assert "lora" in students


def config_of_run(config: DistillConfig, parallelism: Parallelism) -> DistillConfig:
    """With the accumulation that follows from a global batch, as `print_memory` is told."""
    return replace(
        config, gradient_accumulation_steps=divide(config, parallelism.world, 1, None)[1]
    )


def drop(typed: list[str], flags: list[str]) -> list[str]:
    """A command line without some flags and their values."""
    kept, skipping = [], False
    for word in typed:
        skipping = word in flags if word.startswith("--") else skipping
        kept += [] if skipping else [word]
    return kept


def both(config: DistillConfig, parallelism: Parallelism) -> list:
    """The student's own ladder, and a LoRA's."""
    return ladder(config, config.student, parallelism) + ladder(config, "lora", parallelism)


def flags_in(config: DistillConfig, parallelism: Parallelism) -> set[str]:
    return {name for change in both(config, parallelism) for name in change}


def test_what_is_offered_to_whom():
    full = DistillConfig("m", Path("c"), Path("r"), student="full", mixed_precision="no")
    assert {"offload_ema", "use_8bit_adam", "student"} <= flags_in(full, ALONE)
    assert not {"offload_ema", "use_8bit_adam"} & flags_in(full, FSDP)
    tuned = DistillConfig("m", Path("c"), Path("r"), student="full", objective="denoise")
    assert "offload_ema" not in flags_in(tuned, ALONE)
    for change in both(full, ALONE):
        assert not {"student", "offload_ema"} <= set(change)


@pytest.fixture(scope="module")
def unet(tiny_sd):
    from shared.models.family import load_config

    return load_config(str(tiny_sd), "unet/config.json")


def test_a_lora_instead_of_a_full_student():
    config = parse(DistillConfig, [*BASE, "--student", "full", "--ema-decay", "0.9"], "prog")
    change = ladder(config, "lora", ALONE)[0]
    changed, left_out = apply(config, change)
    assert words(change, left_out) == "--student lora and without --ema-decay"
    assert changed.ema_decay == 0.95


@pytest.mark.slow
def test_a_run_that_is_refused_alone_goes_on_in_shards(unet, monkeypatch):
    """A card that holds less than all weights and averages, but more than a quarter of them."""
    monkeypatch.setattr("train.memory.advice.fitting", lambda *_: None)  # the other tests' business
    config = DistillConfig("m", Path("c"), Path("r"), student="full", train_batch_size=1)
    alone = estimate(unet, config, SIZE)
    card = int(0.6 * (alone.weights + alone.optimizer))
    with pytest.raises(UserError, match=r"no flags make it fit.*--use_fsdp --fsdp_version 2"):
        memory_line(unet, config, SIZE, card)
    line = memory_line(unet, config, SIZE, card, FSDP)
    weights = size_of(estimate(unet, config, SIZE, FSDP).weights)
    assert f"on each of 4 processes, with FSDP's shards of all weights (weights {weights}" in line
    assert "with DDP's buckets" in memory_line(unet, config, SIZE, 10**12, DDP)
