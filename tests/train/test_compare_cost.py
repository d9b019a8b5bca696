"""The cost of a training step beside LCD's, against forwards counted one by one on a CPU."""

from pathlib import Path

import pytest
import torch

from benchmarks.common.steps import flops
from shared.models.family import resolve_model
from tests.support.students import build, stock_unet
from train.comparison.cost import relative_cost
from train.config import RunConfig
from train.memory.operations import drawing_flops, step_flops

RANK = 6


def config(model: Path, student: str = "lora", **flags) -> RunConfig:
    return RunConfig(
        model=str(model), cache=Path(), run=Path(), student=student, lora_rank=RANK,
        unet_time_cond_proj_dim=16, **flags,
    )  # fmt: skip


def cost(model: Path, *words, steps: int = 10, **flags) -> float:
    return relative_cost(resolve_model(str(model)), config(model, *words, **flags), steps)


@pytest.fixture(scope="module")
def counted(tiny_sd):
    """Operations of one picture: of forwards and of forwards with the backward pass."""
    unets = {kind: build(tiny_sd, kind, lora_rank=RANK).unet for kind in ("lora", "full")}
    unets["teacher"] = stock_unet(tiny_sd)

    def forward(kind: str):
        unet = unets[kind]
        told = None if kind != "full" else torch.zeros(1, 16)
        return unet(torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64),
                    torch.zeros(1, 77, 64), timestep_cond=told).sample  # fmt: skip

    found = {}
    for kind in unets:
        with torch.no_grad():
            found[kind] = flops(lambda kind=kind: forward(kind))
        found[kind, "trained"] = flops(lambda kind=kind: forward(kind).square().mean().backward())
    return found


def lcd(counted, kind: str) -> int:
    """Student with gradients, target, and the teacher with and without the caption."""
    return counted[kind, "trained"] + counted[kind] + 2 * counted["teacher"]


def test_lcd_is_the_unit_exactly(tiny_sd, counted):
    model = resolve_model(str(tiny_sd))
    found = step_flops(model, config(tiny_sd, teacher="online"), 1)
    assert found == pytest.approx(lcd(counted, "lora"), rel=0.02)
    others = {"num_ddim_timesteps": 25, "loss_type": "l2", "seed": 3}
    saving = {"gradient_checkpointing": True, "mixed_precision": "bf16"}
    assert cost(tiny_sd, teacher="online", **others, **saving) == 1


def test_drawing_takes_a_forward_a_step_and_with_guidance_two(tiny_sd, counted):
    model = resolve_model(str(tiny_sd))
    for kind in ("lora", "full"):
        wanted = pytest.approx(4 * counted[kind], rel=1e-3)
        assert drawing_flops(model, config(tiny_sd, kind), 4) == wanted
    found = drawing_flops(model, config(tiny_sd, "full", objective="denoise"), 50)
    assert found == pytest.approx(100 * counted["teacher"], rel=1e-3)


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "full"])
def test_what_has_no_teacher_takes_fewer_forwards(tiny_sd, counted, kind):
    alone, target = counted[kind, "trained"], counted[kind]
    unit = lcd(counted, kind)
    assert cost(tiny_sd, kind, objective="lcf") == pytest.approx((alone + target) / unit, rel=0.02)
    assert cost(tiny_sd, kind, teacher="cached") == pytest.approx((alone + target) / unit, rel=0.02)
    if kind == "full":  # which is the teacher itself, without a guidance input
        alone = 3 * counted["teacher"]
    wanted = pytest.approx(alone / unit, rel=0.02)
    assert cost(tiny_sd, kind, objective="denoise") == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_trajectory_objective_takes_as_many_as_lcd(tiny_sd, kind):
    assert cost(tiny_sd, kind, objective="pcm", teacher="online") == pytest.approx(1, rel=0.02)


@pytest.mark.slow
def test_a_network_beside_the_student_counts_with_how_often_each_is_moved(tiny_sd, counted):
    flags = {"objective": "dmd", "fake_warmup_steps": 2, "fake_updates": 2, "max_train_steps": 10}
    forward, trained = counted["lora"], counted["lora", "trained"]
    fake = forward + trained  # the student draws, the fake score learns
    student = forward + forward + 2 * counted["teacher"] + trained  # drawn, judged twice, moved
    for steps, moved in ((2, 0), (4, 1), (6, 2)):
        wanted = (fake + student * moved / steps) / lcd(counted, "lora")
        assert cost(tiny_sd, steps=steps, **flags) == pytest.approx(wanted, rel=0.02)


@pytest.mark.slow
def test_the_kind_of_model_does_not_matter(tiny_xl):
    assert cost(tiny_xl, teacher="online") == 1
    assert 0.5 < cost(tiny_xl, teacher="cached") < 0.8
