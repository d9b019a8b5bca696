"""Consistency fine-tuning against a float64 NumPy reference; and that it needs no teacher."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cli.config import parse
from shared.diffusion import Schedule, schedule_from_config
from shared.errors import UserError
from tests.support.lcd_reference import (
    Affine,
    B,
    G,
    Stock,
    make_batch,
    make_data,
    reference_abar,
    reference_guidance_embedding,
)
from tests.support.students import build
from tests.support.trajectory_reference import Setting, lcf_reference
from train.config import DistillConfig, RunConfig
from train.flags import check_flags
from train.memory.estimate import estimate
from train.objectives import OBJECTIVES, asks_teacher
from train.objectives.lcf import LCF

SETTINGS = [
    pytest.param(Setting(p, loss, c), scaling, id=f"{p}-{loss}-{c}-{scaling}")
    for p in ("epsilon", "v_prediction")
    for loss, c, scaling in [("l2", 1e-3, 10.0), ("huber", 1e-3, 10.0), ("huber", 0.3, 0.01)]
]


@pytest.mark.parametrize(("setting", "scaling"), SETTINGS)
def test_loss_and_gradient_equal_the_reference(setting, scaling):
    rng, data = np.random.default_rng(7), make_data(3)
    student = Affine.random(rng, G)
    embedding = reference_guidance_embedding(data["w"], G)
    extra = {"student": embedding}
    wanted, g, z, late = lcf_reference(setting, data, student, student, extra, scaling)
    gradient = student.gradient(g, z, late, data["text"], embedding)

    networks = Stock(student, student, told=True)
    networks.teacher = None  # is not asked
    schedule = Schedule(torch.tensor(reference_abar()), setting.prediction_type)
    lcf = LCF(schedule, 50, scaling, setting.loss_type, setting.huber_c)
    mine = lcf(*make_batch(data, torch.float64), networks)
    mine.backward()
    np.testing.assert_allclose(mine.item(), wanted, rtol=1e-9)
    for name, parameter in networks.parameters.items():
        np.testing.assert_allclose(parameter.grad, gradient[name], rtol=1e-8, atol=1e-12)


def test_the_first_interval_is_compared_with_the_data_themselves():
    """At t_n = 0 the consistency function is the identity, whatever the target network says."""
    schedule = Schedule(torch.tensor(reference_abar()), "epsilon")
    data = make_data(3)
    data["index"] = np.zeros(B, np.int64)
    batch, empty = make_batch(data, torch.float64)
    z0 = (
        np.sqrt(reference_abar()[0]) * data["latents"]
        + np.sqrt(1 - reference_abar()[0]) * data["noise"]
    )

    class Networks:
        def student(self, z, t, batch):
            return torch.zeros_like(z)

        def target(self, z, t, batch):
            return torch.full_like(z, 1e3)

    lcf = LCF(schedule, 50, 10.0, "l2", 1e-3)
    z19 = (
        np.sqrt(reference_abar()[19]) * data["latents"]
        + np.sqrt(1 - reference_abar()[19]) * data["noise"]
    )
    skip, through = 0.25 / (190**2 + 0.25), 190 / np.sqrt(190**2 + 0.25)
    found = skip * z19 + through * z19 / np.sqrt(reference_abar()[19])
    np.testing.assert_allclose(
        lcf(batch, empty, Networks()).item(), np.mean((found - z0) ** 2), rtol=1e-9
    )


def test_a_full_student_has_two_networks_and_no_teacher(tiny_sd):
    full = build(tiny_sd, "full", objective="lcf")
    assert full.networks() == [full.unet, full.target_unet]
    assert full.unet.config.time_cond_proj_dim == 16  # a distilled student's input, kept
    assert len(build(tiny_sd, "full").networks()) == 3


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_there_is_no_teacher_in_memory(tiny_sd, kind):
    unet = json.loads((tiny_sd / "unet/config.json").read_text())
    sizes = {}
    for objective, more in (("lcf", {}), ("lcd", {"teacher": "cached"}), ("lcd", {}), ("pcm", {})):
        config = DistillConfig(
            str(tiny_sd), None, None, objective=objective, student=kind, lora_rank=4,
            unet_time_cond_proj_dim=16, **more,
        )  # fmt: skip
        assert asks_teacher(config) == (objective != "lcf" and not more)
        sizes[objective, *more] = estimate(unet, config, (8, 8))
    assert sizes["lcf",] == sizes["lcd", "teacher"]
    assert sizes["pcm",] == sizes["lcd",]
    assert (sizes["lcf",].weights < sizes["lcd",].weights) == (kind == "full")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--w-min", "3"], r"^--w-min is told to a --student full; .* keeps the guidance .* leave"),
        (["--w-max", "3"], r"^--w-max is told to a --student full"),
        (["--num-ddim-timesteps", "70"], "--num-ddim-timesteps 70 must divide 1000"),
    ],
)
def test_what_means_nothing_to_it_is_refused(words, says):
    flags = ["--model", "m", "--cache", "c", "--run", "r", "--objective", "lcf", *words]
    schedule = schedule_from_config({"beta_schedule": "scaled_linear"})
    config = parse(RunConfig, flags, "prog")

    def check(config):
        check_flags(config)
        OBJECTIVES["lcf"].build(config, schedule, None)

    with pytest.raises(UserError, match=says):
        check(config)
    if "--w-m" in words[0]:
        check(replace(config, student="full"))


def test_its_students_are_drawn_as_lcds(tiny_sd):
    config = DistillConfig("m", Path("c"), Path("r"), objective="lcf", num_ddim_timesteps=25)
    teacher = json.loads((tiny_sd / "scheduler/scheduler_config.json").read_text())
    ours, lcd = (OBJECTIVES[name].sampler.build(teacher, config) for name in ("lcf", "lcd"))
    assert ours.config == lcd.config
    assert ours.config.original_inference_steps == 25
