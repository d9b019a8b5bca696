"""Learning rates against diffusers' own, the optimizers and their states."""

import itertools
import sys

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from shared.errors import UserError
from train.config import DistillConfig
from train.networks.build import build_student
from train.state import checkpoint
from train.state.optim import base_learning_rate, build_optimizer, set_learning_rate
from train.state.restore import Moments, restore_optimizers

STEPS, WARMUP, BASE = 23, 5, 3e-4
SCHEDULES = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"lr_num_cycles": 3},
    "polynomial": {"lr_power": 2.0},
}


def config(**more) -> DistillConfig:
    return DistillConfig("tiny-sd", None, None, **more)


def theirs(name: str, warmup: int, more: dict) -> list[float]:
    """The rate of each optimizer step as a script that uses diffusers' scheduler has it."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS,
        num_cycles=more.get("lr_num_cycles", 1), power=more.get("lr_power", 1.0),
    )  # fmt: skip
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(name: str, warmup: int, more: dict) -> list[float]:
    settings = config(lr_scheduler=name, lr_warmup_steps=warmup, max_train_steps=STEPS, **more)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = []
    for step in range(1, STEPS + 1):
        set_learning_rate(optimizer, BASE, step, settings)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_has_the_rate_that_diffusers_gives_it(name):
    more = SCHEDULES[name]
    assert ours(name, 0, more) == pytest.approx(theirs(name, 0, more), rel=1e-9, abs=1e-15)
    mine = ours(name, WARMUP, more)
    if name != "constant":  # diffusers' constant schedule accepts a warm-up and ignores it
        reference = theirs(name, WARMUP, more)
        assert mine[WARMUP:] == pytest.approx(reference[WARMUP:], rel=1e-9, abs=1e-15)
        assert mine[: WARMUP - 1] == pytest.approx(reference[1:WARMUP])  # ahead by a step
        assert reference[0] == 0  # which they waste
    assert mine[:WARMUP] == pytest.approx([BASE * step / WARMUP for step in range(1, WARMUP + 1)])


def test_cosine_falls_all_the_way():
    rates = ours("cosine", 0, {})
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == BASE
    assert 0 < rates[-1] < BASE / 100


def test_schedules_differ():
    for one, other in itertools.combinations(list(SCHEDULES)[1:], 2):
        assert ours(one, 0, SCHEDULES[one]) != ours(other, 0, SCHEDULES[other])


def test_a_longer_run_than_planned_stays_at_the_end():
    settings = config(lr_scheduler="cosine_with_restarts", max_train_steps=10)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    set_learning_rate(optimizer, BASE, 12, settings)
    assert optimizer.param_groups[0]["lr"] == 0


def test_scaled_by_the_global_batch():
    parts = {"train_batch_size": 3, "gradient_accumulation_steps": 2}
    assert base_learning_rate(config(**parts), batch_size=24) == 1e-4
    assert base_learning_rate(config(scale_lr=True, **parts), batch_size=24) == pytest.approx(24e-4)
    full = config(scale_lr=True, student="full", learning_rate=1e-6, **parts)
    assert base_learning_rate(full, 6) == pytest.approx(6e-6)


def parameters(
    seed: int = 0, device: str = "cpu", conv=torch.channels_last
) -> dict[str, nn.Parameter]:
    """Three large enough for 8 bits, one not; the convolution's lies as `conv` says."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"a": (96, 64), "b": (10,), "c": (64, 96), "conv": (32, 16, 3, 3)}
    values = {name: torch.randn(shape, generator=rng).to(device) for name, shape in shapes.items()}
    values["conv"] = values["conv"].to(memory_format=conv)
    return {name: nn.Parameter(value) for name, value in values.items()}


def train(optimizer, weights, steps) -> None:
    for step in steps:
        rng = torch.Generator().manual_seed(step)
        for weight in weights.values():
            gradient = torch.randn(weight.shape, generator=rng)
            weight.grad = torch.empty_like(weight).copy_(gradient)  # it lies as autograd's do
        optimizer.step()


def lies(value) -> tuple:
    """What the fused AdamW insists on: kind, dtype and strides."""
    return (type(value), *((value.dtype, value.stride()) if torch.is_tensor(value) else ()))


def continued(settings: DistillConfig, tmp_path, device: str = "cpu") -> None:
    """Six steps, and three steps, a checkpoint, and three more: the same bits."""
    # As `build_student` leaves it.
    conv = torch.contiguous_format if settings.use_8bit_adam else torch.channels_last
    straight = parameters(device=device, conv=conv)
    train(build_optimizer(settings, straight), straight, range(6))
    first = parameters(device=device, conv=conv)
    optimizer = build_optimizer(settings, first)
    train(optimizer, first, range(3))
    state = checkpoint.optimizer_state(optimizer, first)
    progressed = checkpoint.TrainingState(3, 3, 1, {})
    folder = checkpoint.save_checkpoint(
        tmp_path, checkpoint.Checkpoint(progressed, first, state), None
    )
    second = parameters(seed=9, device=device, conv=conv)
    again = build_optimizer(settings, second)
    with torch.no_grad():
        for name, weight in second.items():
            weight.copy_(checkpoint.load_networks(folder)[name])
    restore_optimizers(folder, [Moments(again, second, begun=True)])
    for name, weight in second.items():
        mine, before = again.state[weight], optimizer.state[first[name]]
        assert mine.keys() == before.keys()
        assert {k: lies(v) for k, v in mine.items()} == {k: lies(v) for k, v in before.items()}
    train(again, second, range(3, 6))
    for name, weight in second.items():
        assert torch.equal(weight, straight[name])


def test_adamw_goes_on_where_it_was(tmp_path):
    settings = config(adam_beta1=0.8, adam_weight_decay=0.1, adam_epsilon=1e-6)
    group = build_optimizer(settings, parameters()).param_groups[0]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.999), 0.1, 1e-6)
    assert group["fused"]
    continued(settings, tmp_path)


def test_it_is_the_plain_adamw():
    settings = config(adam_beta1=0.8, adam_weight_decay=0.1, adam_epsilon=1e-6)
    ours, theirs = parameters(), parameters(conv=torch.contiguous_format)
    plain = torch.optim.AdamW(
        theirs.values(), betas=(0.8, 0.999), weight_decay=0.1, eps=1e-6, fused=False
    )
    train(build_optimizer(settings, ours), ours, range(4))
    train(plain, theirs, range(4))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6, check_stride=False)


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="--use-8bit-adam wants bitsandbytes; `pip install"):
        build_optimizer(config(use_8bit_adam=True), parameters())


@pytest.mark.parametrize("objective", ["lcd", "denoise"])
def test_weights_lie_as_8_bit_adam_reads_them(tiny_sd, objective):
    """It goes through weights and averages linearly, and makes averages as the weights lie."""
    for in_8_bits in (False, True):
        settings = config(student="full", objective=objective, use_8bit_adam=in_8_bits)
        weights = build_student(str(tiny_sd), settings).trainable().values()
        assert all(weight.is_contiguous() for weight in weights) == in_8_bits


def test_8_bit_adam_goes_on_where_it_was(tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = config(use_8bit_adam=True)
    weights = parameters()
    optimizer = build_optimizer(settings, weights)
    train(optimizer, weights, range(1))
    assert optimizer.state[weights["a"]]["state1"].dtype == torch.uint8
    continued(settings, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [{}, {"use_8bit_adam": True}], ids=["fused", "8bit"])
def test_on_a_gpu(tmp_path, more):
    if more:
        pytest.importorskip("bitsandbytes")
    else:
        assert build_optimizer(config(), parameters(device="cuda")).param_groups[0]["fused"]
    continued(config(**more), tmp_path, "cuda")
