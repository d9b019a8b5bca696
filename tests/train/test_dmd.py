"""`--objective dmd`: its losses against float64 references, its timesteps, noises and turns."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import Schedule, schedule_from_config
from shared.errors import UserError
from tests.support.dmd_reference import (
    Reference,
    Setting,
    Torch,
    make_batch,
    make_data,
    make_networks,
)
from tests.support.lcd_reference import reference_abar
from train.config import DistillConfig
from train.evaluation.evaluate import student_samplings
from train.objectives import OBJECTIVES
from train.objectives.dmd import DMD, build, student_due

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SETTINGS = [
    pytest.param(Setting(kind, steps, gan), id=f"{kind}-{steps}-steps{'-gan' * (gan > 0)}")
    for kind in ("epsilon", "v_prediction")
    for steps, gan in [(1, 0.0), (1, 0.3), (4, 0.0), (3, 0.05)]
]


def dmd_of(setting: Setting) -> DMD:
    schedule = Schedule(torch.tensor(reference_abar()), setting.prediction_type)
    return DMD(schedule, setting.steps, setting.scaling, setting.gan_weight)


def asked(setting: Setting, seed: int = 3):
    """The loss, its batch and its networks, and the reference of all."""
    data, networks = make_data(seed, setting.steps), make_networks(7)
    empty = TextEmbeds(torch.from_numpy(data["empty"]), None)
    mine = Torch(networks, setting.gan_weight > 0)
    return dmd_of(setting), make_batch(data), empty, mine, Reference(setting, data, networks)


def assert_gradients(part: torch.nn.ParameterDict, wanted: dict[str, np.ndarray]) -> None:
    for name, values in wanted.items():
        if name != "U":  # what these networks are told besides: nothing
            np.testing.assert_allclose(part[name].grad, values, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_students_loss_and_gradient_equal_the_reference(setting):
    dmd, batch, empty, networks, reference = asked(setting)
    loss = dmd(batch, empty, networks)
    loss.backward()
    wanted, gradient, _ = reference.student()
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
    assert_gradients(networks.weights["student"], gradient)
    others = [p for name in ("teacher", "fake") for p in networks.weights[name].values()]
    assert [p.grad for p in others] == [None] * len(others)
    assert networks.q is None or networks.q.grad is None


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_fake_scores_loss_and_gradient_equal_the_reference(setting):
    dmd, batch, empty, networks, reference = asked(setting)
    loss = dmd.fake_loss(batch, empty, networks)
    loss.backward()
    wanted, gradient, by_q = reference.fake()
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
    assert_gradients(networks.weights["fake"], gradient)
    if networks.q is not None:
        np.testing.assert_allclose(networks.q.grad, by_q, rtol=1e-8)
    others = [p for name in ("teacher", "student") for p in networks.weights[name].values()]
    assert [p.grad for p in others] == [None] * len(others)
    assert "teacher" not in networks.asked


def test_each_samples_gradient_is_normalised_by_itself():
    """A picture ten times as far from the teacher's does not move ten times as far."""
    setting = Setting("epsilon")
    dmd, batch, empty, networks, reference = asked(setting)
    x = dmd.f(networks.target(batch.noise, dmd.timesteps[batch.index], batch),
              batch.noise, dmd.timesteps[batch.index])  # fmt: skip
    gradient, gan, slope = dmd.judge(x, batch, empty, networks)
    np.testing.assert_allclose(gradient, reference.student()[2], rtol=1e-8)
    assert (gan, slope) == (None, None)
    alone = replace(batch, **{k: v[2:3] for k, v in batch.tensors().items()})
    again, *_ = dmd.judge(x[2:3], alone, empty, networks)
    torch.testing.assert_close(again, gradient[2:3])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 50, 1000])
def test_stock_lcm_scheduler_draws_at_the_timesteps_of_training(steps):
    config = DistillConfig("m", None, None, objective="dmd", num_student_steps=steps)
    teacher = {**SD, "_class_name": "DDIMScheduler", "num_train_timesteps": 1000}
    scheduler = OBJECTIVES["dmd"].sampler.build(teacher, config)
    assert type(scheduler) is LCMScheduler
    assert OBJECTIVES["dmd"].sampler.usual_steps(config) == steps
    scheduler.set_timesteps(steps)
    dmd = DMD(schedule_from_config(teacher), steps, 10.0, 0.0)
    assert scheduler.timesteps.tolist() == dmd.timesteps.tolist()
    assert scheduler.init_noise_sigma == 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_backward_simulation_goes_the_way_of_stock_lcm_scheduler(kind):
    """The last of four steps begins where the scheduler has come to, with the same noises."""
    setting = Setting(kind, steps=4)
    dmd, batch, _, networks, _ = asked(setting)
    dmd = replace(dmd, schedule=schedule_from_config({**SD, "prediction_type": kind}))
    batch = replace(batch, index=torch.full_like(batch.index, 3))
    z, t = dmd.simulate(batch, networks)
    scheduler = OBJECTIVES["dmd"].sampler.build(
        {**SD, "prediction_type": kind},
        DistillConfig("m", None, None, objective="dmd", num_student_steps=4),
    )
    scheduler.set_timesteps(4)
    stock = batch.noise
    for step, time in enumerate(scheduler.timesteps[:3]):
        output = networks.target(stock, time.expand(len(stock)), batch)
        _, denoised = scheduler.step(output, time, stock, return_dict=False)
        noise, following = batch.noises[:, step], scheduler.timesteps[step + 1]
        stock = scheduler.add_noise(denoised, noise, following.expand(len(stock)))
    torch.testing.assert_close(z, stock, rtol=1e-5, atol=1e-6)
    assert t.tolist() == [249] * len(z)


@pytest.mark.parametrize(
    ("steps", "previewed", "evaluated"),
    [(1, [1], [1]), (3, [1, 2, 3], [1, 2, 3]), (4, [1, 2, 4], [1, 2, 4]),
     (16, [1, 2, 4, 8, 16], [1, 2, 4, 8, 16])],
)  # fmt: skip
def test_previews_and_evaluation_draw_in_all_of_its_steps(steps, previewed, evaluated):
    config = flags(num_student_steps=steps)
    assert OBJECTIVES["dmd"].sampler.previewed_steps(config) == previewed
    artist = SimpleNamespace(config=config, scheduler_config=SD)
    assert [steps for _, steps in student_samplings(artist)] == evaluated


def test_no_noise_and_no_number_serves_twice():
    """A change of each changes the loss that it is for, and no other."""
    setting = Setting("epsilon", steps=3)
    dmd, batch, empty, networks, _ = asked(setting)
    assert (dmd.intervals, dmd.uniforms, dmd.noises) == (3, 2, 4)
    before = [loss(batch, empty, networks).item() for loss in (dmd, dmd.fake_loss)]

    def changed(**more) -> list[bool]:
        other = replace(batch, **more)
        now = [loss(other, empty, networks).item() for loss in (dmd, dmd.fake_loss)]
        return [a != b for a, b in zip(now, before, strict=True)]

    for number, wanted in enumerate([[True, True], [True, True], [True, False], [False, True]]):
        noises = batch.noises.clone()
        noises[:, number] += 0.1
        assert changed(noises=noises) == wanted
    for number, wanted in enumerate([[True, False], [False, True]]):
        uniforms = batch.uniforms.clone()
        uniforms[:, number] = 0.5
        assert changed(uniforms=uniforms) == wanted
    assert changed(latents=batch.latents + 1) == [False, False]  # no pictures without a GAN term


def test_taus_are_uniform_between_their_bounds():
    dmd = dmd_of(Setting("epsilon"))
    even = (torch.arange(961 * 4) + 0.5) / (961 * 4)
    taus, counts = dmd.timestep(even, 0.02, 0.98).unique(return_counts=True)
    assert taus.tolist() == list(range(20, 981))
    assert set(counts.tolist()) == {4}
    ends = torch.tensor([0.0, 1 - 2.0**-24])
    assert dmd.timestep(ends, 0.0, 1.0).tolist() == [0, 999]
    assert dmd.timestep(ends, 0.02, 0.98).tolist() == [20, 980]


# ---- Whose turn it is, and what is refused.


def flags(**more) -> DistillConfig:
    return DistillConfig("m", cache=Path("c"), run=Path("r"), objective="dmd", **more)


def test_the_student_learns_at_each_so_manieth_step_after_the_warm_up():
    config = flags(fake_updates=3, fake_warmup_steps=4)
    assert [step for step in range(1, 15) if student_due(config, step)] == [7, 10, 13]
    always = flags(fake_updates=1, fake_warmup_steps=0)
    assert all(student_due(always, step) for step in range(1, 9))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_student_steps": 1001}, "--num-student-steps 1001 must be 1 to 1000"),
        ({"max_train_steps": 104}, "the student first learns in step 105 .* there are 104; give"),
    ],
)
def test_steps_that_cannot_be_are_refused(more, message):
    with pytest.raises(UserError, match=message) as error:
        build(flags(**more), schedule_from_config(SD))
    assert "\n" not in str(error.value)
    assert build(flags(max_train_steps=105), schedule_from_config(SD)).intervals == 1
