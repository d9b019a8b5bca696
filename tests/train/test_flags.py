"""Flags of `train distill`: other tools' names, epochs, mistakes, adapters, clipping."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

WORDS = ["--train-batch-size", 2, "--threads", 1, "--validation-steps", 0]


def test_their_names_train(cli, tiny_cache, tmp_path):
    """As somebody types who knows the official scripts."""
    answer = cli(
        "train", "distill", "--pretrained_teacher_model=tiny-sd", "--output_dir", tmp_path / "run",
        "--caption-dropout-rate", 0.5, "--cache", tiny_cache, *WORDS, "--max_train_steps", 1,
        "--lr_scheduler", "cosine_with_restarts", "--lr_num_cycles", 2, "--scale_lr",
        "--learning_rate", 1e-5,
    )  # fmt: skip
    assert answer.status == 0, answer.err
    assert "learning rate 2e-05" in answer.err  # times two samples
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


def test_their_names_in_toml(cli, tiny_cache, tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'pretrained_teacher_model = "tiny-sd"\ncache = "{tiny_cache}"\n'
        f'output-dir = "{tmp_path / "run"}"\nvalidation_steps = 0\n'
    )
    assert cli("train", "distill", "--config", toml, "--dry-run").status == 0
    toml.write_text("cache_latents = true\n")
    answer = cli("train", "distill", "--config", toml)
    assert answer.status == 2
    assert answer.err.startswith("error: --cache-latents: `python -m prep encode` caches")


@pytest.fixture
def dry(cli, tiny_cache, tmp_path):
    def run(*words):
        return cli("train", "distill", "--model", "tiny-sd", "--cache", tiny_cache, "--run",
                   tmp_path / "run", *WORDS, "--dry-run", *words)  # fmt: skip

    return run


def test_epochs_become_steps(dry):
    """72 samples: three passes in steps of 2 x 2 samples, one in steps of 10."""
    answer = dry("--num-train-epochs", 3, "--gradient-accumulation-steps", 2)
    assert "54 steps of 4 samples, 3.0 passes over 72 samples" in answer.err
    answer = dry("--num-train-epochs", 1, "--train-batch-size", 10)
    assert "8 steps of 10 samples" in answer.err


MISTAKES = [
    (["--num-train-epochs", 2, "--max-train-steps", 5], ["exclude each other"]),
    (["--num-train-epochs", 0], ["--num-train-epochs 0 must be at least 1"]),
    (["--lr-num-cycles", 3], ["--lr-num-cycles is for --lr-scheduler cosine_with_restarts and"]),
    (["--lr-power", 2, "--lr-scheduler", "linear"], ["--lr-power is for", "polynomial"]),
    (["--lr-warmup-steps", -1], ["--lr-warmup-steps -1"]),
    (["--learning-rate", 0], ["--learning-rate 0"]),
    (["--lr-scheduler", "polynomial", "--learning-rate", 1e-8], ["--learning-rate 1e-08", "1e-07"]),
    (["--offload-ema"], ["--offload-ema is for --student full", "leave it out"]),
    (["--offload-ema", "--student", "full"], ["half-precision copy", "--mixed-precision bf16"]),
    (["--lora-target-modules", "to_q,to_z"], ["'to_z'", "LCM's are to_q,to_k"]),
]


@pytest.mark.parametrize(("words", "parts"), MISTAKES, ids=lambda words: str(words[0]))
def test_mistakes(dry, words, parts):
    answer = dry(*words)
    assert answer.status in (1, 2), answer
    assert answer.err.count("\n") == 1
    for part in parts:
        assert part in answer.err


@pytest.mark.parametrize("words", [["--allow-tf32"], ["--attention", "xformers"],
                                   ["--enable_xformers_memory_efficient_attention"]])  # fmt: skip
def test_what_wants_a_gpu(dry, words):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    answer = dry("--device", "cpu", *words)
    assert answer.status == 1
    assert "wants a CUDA device, this is a cpu; leave it out" in answer.err


def test_adapters_go_where_they_are_told(tiny_sd):
    from train.config import DistillConfig
    from train.networks.build import build_student

    config = DistillConfig(str(tiny_sd), None, None, lora_rank=2, lora_target_modules="to_q, to_k")
    student = build_student(str(tiny_sd), config)
    adapted = {re.sub(r"\.lora_.*", "", name).rpartition(".")[2] for name in student.trainable()}
    assert adapted == {"to_q", "to_k"}


@pytest.mark.parametrize(("limit", "length"), [(1.0, 1.0), (100.0, 5.0), (0.0, 5.0)])
def test_gradients_are_clipped_unless_the_limit_is_0(limit, length):
    """kohya's way; the norm before clipping is what is recorded."""
    from train.config import DistillConfig
    from train.data.batch import Batch
    from train.trainer.loop import backward
    from train.trainer.trainable import Trainable

    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    run = SimpleNamespace(
        config=DistillConfig("m", None, None, max_grad_norm=limit), accumulation=1, empty=None,
        distributed=SimpleNamespace(accumulating=lambda network, last: nullcontext()), student=None,
        autocast=nullcontext, objective=None, scaler=torch.amp.GradScaler(enabled=False),
    )  # fmt: skip
    one = Trainable(
        name="", network=None, loss=lambda objective: lambda *_: (weight**2).sum() / 2,
        parameters={"weight": weight}, optimizer=torch.optim.SGD([weight]), learning_rate=1,
        due=bool,
    )  # fmt: skip
    _, norm = backward(run, one, Batch(*[torch.zeros(1)] * 7))
    assert norm.item() == 5.0
    assert weight.grad.norm().item() == pytest.approx(length)


def test_every_seed_that_is_taken_can_be_used():
    from train.trainer.loop import seed_dropout

    seed_dropout(7, step=5, rank=2)
    assert torch.initial_seed() == (7 * 1_000_003 + 5) * 65_537 + 2  # runs of today go on the same
    seed_dropout(2**63 - 1, step=10**6, rank=63)
