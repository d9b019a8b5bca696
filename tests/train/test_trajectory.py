"""Trajectory targets (PCM, TCD) against a float64 NumPy reference, stock code and LCD itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import TCDScheduler

from shared.diffusion import (
    Schedule,
    phase_edges,
    schedule_from_config,
    schedule_targets,
    solver_timesteps,
)
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
from tests.support.trajectory_reference import Setting, trajectory_reference
from train.config import DistillConfig
from train.objectives import OBJECTIVES
from train.objectives.formulas import trajectory_function
from train.objectives.lcd import LCD

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNIFORMS = np.array([0.0, 0.999999, 0.5, 0.31, 0.99, 0.02], np.float32)
FOUR, EIGHT = [0, 259, 499, 759], [0, 139, 259, 379, 499, 639, 759, 879]  # of 50 intervals


def loss_of(objective: str, setting: Setting, schedule: Schedule | None = None, **flags):
    """The loss as the flags ask for it, in float64."""
    config = DistillConfig(
        objective=objective, num_ddim_timesteps=setting.num_ddim_timesteps,
        loss_type=setting.loss_type, huber_c=setting.huber_c, **flags,
    )  # fmt: skip
    schedule = schedule or Schedule(torch.tensor(reference_abar()), setting.prediction_type)
    return OBJECTIVES[objective].build(config, schedule, None)


def phases(edges):
    return lambda late, early: np.array([max(e for e in edges if e < max(t, 1)) for t in late])


def anywhere(late, early):
    return np.floor(UNIFORMS.astype(float) * (early + 1)).astype(int)


def among(times):
    def choose(late, early):
        below = [[t for t in times if t <= end] for end in early]
        return np.array([some[int(u * len(some))] for some, u in zip(below, UNIFORMS, strict=True)])

    return choose


TARGETS = {
    "pcm": ("pcm", {}, phases([0, 239, 499, 739])),
    "pcm-3": ("pcm", {"num_phases": 3}, phases([0, 319, 659])),
    "pcm-1": ("pcm", {"num_phases": 1}, phases([0])),
    "tcd": ("tcd", {}, anywhere),
    "tcd-4-8": ("tcd", {"target_steps": (4, 8)}, among(sorted({*FOUR, *EIGHT}))),
}
SETTINGS = [
    pytest.param(Setting(p, loss, c), id=f"{p}-{loss}-{c}")
    for p in ("epsilon", "v_prediction")
    for loss, c in [("l2", 1e-3), ("huber", 1e-3), ("huber", 0.3)]
]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_and_gradient_equal_the_reference(setting, name):
    objective, flags, landing = TARGETS[name]
    rng = np.random.default_rng(7)
    student, teacher = Affine.random(rng, G), Affine.random(rng, G)
    data = make_data(3)
    data["index"] = np.array([0, 1, 12, 25, 37, 49])  # three begin at edges of 4 phases
    embedding = reference_guidance_embedding(data["w"], G)
    extra = {"student": embedding, "cond": np.zeros((B, G)), "uncond": np.zeros((B, G))}
    wanted, g, z, late = trajectory_reference(
        setting, data, student, student, teacher, extra, landing
    )
    gradient = student.gradient(g, z, late, data["text"], embedding)

    networks = Stock(student, teacher, told=True)
    batch, empty = make_batch(data, torch.float64)
    batch = replace(batch, uniforms=torch.tensor(UNIFORMS[:, None]))
    mine = loss_of(objective, setting, **flags)(batch, empty, networks)
    mine.backward()
    np.testing.assert_allclose(mine.item(), wanted, rtol=1e-9)
    for part, parameter in networks.parameters.items():
        np.testing.assert_allclose(parameter.grad, gradient[part], rtol=1e-8, atol=1e-12)
    assert all(parameter.grad is None for parameter in networks.frozen.values())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("objective", "flags"), [("pcm", {"num_phases": 1}), ("tcd", {})])
def test_landing_at_0_is_lcd_without_boundary_scalings(objective, flags, prediction_type):
    """On a schedule that begins without noise, LCD's scalings sent to c_skip = 0, c_out = 1."""
    abar = reference_abar()
    schedule = Schedule(torch.tensor(abar / abar[0]), prediction_type)
    rng, data = np.random.default_rng(7), make_data(3)
    student, teacher = Affine.random(rng, G), Affine.random(rng, G)
    batch, empty = make_batch(data, torch.float64)
    batch = replace(batch, uniforms=torch.zeros(B, 1))
    setting, found = Setting(prediction_type, "huber"), []
    for loss in (loss_of(objective, setting, schedule, **flags),
                 LCD(schedule, 50, 1e12, "huber", 1e-3)):  # fmt: skip
        networks = Stock(student, teacher, told=True)
        value = loss(batch, empty, networks)
        value.backward()
        found.append([value.item(), *(p.grad.numpy() for p in networks.parameters.values())])
    for ours, lcd in zip(*found, strict=True):
        np.testing.assert_allclose(ours, lcd, rtol=1e-9, atol=1e-12)


# ---- Where targets lie.


@pytest.mark.parametrize(("steps", "count"), [(50, 4), (50, 1), (50, 8), (40, 4), (100, 6), (8, 8)])
def test_edges_are_those_of_pcms_own_code(steps, count):
    """Its solver's lines: the timestep before the first of each phase's intervals."""
    ddim = np.arange(1, steps + 1) * (1000 // steps) - 1
    before = np.asarray([0, *ddim[:-1]])
    first = np.floor(np.linspace(0, steps, num=count, endpoint=False)).astype(np.int64)
    assert phase_edges(count, steps, 1000).tolist() == before[first].tolist()


def test_published_edges():
    assert phase_edges(4, 50, 1000).tolist() == [0, 239, 499, 739]


@pytest.mark.parametrize("steps", [50, 40, 100, 20])
def test_the_scheduler_takes_steps_of_the_training_grid(steps):
    config = {**SD, "original_inference_steps": steps, "timestep_spacing": "trailing"}
    scheduler = TCDScheduler.from_config(config)
    every = torch.arange(steps)
    starts, _ = solver_timesteps(every, steps, 1000)
    for count in (*range(1, 9), 13, steps):
        scheduler.set_timesteps(count)
        taken = scheduler.timesteps.tolist()
        assert taken[0] == 999
        assert set(taken) <= set(starts.tolist())
        assert schedule_targets(count, steps, 1000).tolist() == sorted([*taken[1:], 0])


def test_targets_of_schedules_of_4_and_8_steps():
    assert schedule_targets(4, 50, 1000).tolist() == FOUR
    assert schedule_targets(8, 50, 1000).tolist() == EIGHT


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [True, False])
def test_the_scheduler_lands_where_training_does(prediction_type, to_one):
    """Each of its steps is f(z, t -> s), the last one with s = 0, where abar is not quite 1."""
    config = {**SD, "prediction_type": prediction_type, "set_alpha_to_one": to_one}
    schedule = schedule_from_config(config)
    scheduler = TCDScheduler.from_config({**config, "original_inference_steps": 50})
    scheduler.set_timesteps(4)
    z, output = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for t, s in zip(scheduler.timesteps, [759, 499, 259, 0], strict=True):
        ours = trajectory_function(output, z, t[None], torch.tensor([s]), schedule)
        stock = scheduler.step(output, t, z, eta=0.0).prev_sample
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_random_targets_are_uniform_up_to_the_end():
    loss = loss_of("tcd", Setting("epsilon", "l2"))
    assert (loss.uniforms, loss_of("pcm", Setting("epsilon", "l2")).uniforms) == (1, 0)
    batch, _ = make_batch(make_data(0), torch.float32)
    grid = torch.linspace(0, 1, 40_001)[:-1]
    batch = replace(batch, uniforms=grid[:, None])
    for end in (0, 1, 19, 979):
        ends = torch.full((40_000,), end)
        counts = torch.bincount(loss.landing(ends + 20, ends, batch), minlength=end + 1)
        assert len(counts) == end + 1
        assert counts.max() - counts.min() <= 1 + 40_000 % (end + 1) // (end + 1) + 1
    last = replace(batch, uniforms=torch.full((1000, 1), np.nextafter(np.float32(1), 0).item()))
    ends = torch.arange(1000)
    assert torch.equal(loss.landing(ends, ends, last), ends)


def test_targets_of_few_steps_are_equally_likely():
    loss = loss_of("tcd", Setting("epsilon", "l2"), target_steps=(4,))
    batch, _ = make_batch(make_data(0), torch.float32)
    batch = replace(batch, uniforms=torch.linspace(0, 1, 1001)[:-1, None])
    for end, below in ((979, FOUR), (499, [0, 259, 499]), (498, [0, 259]), (258, [0]), (0, [0])):
        ends = torch.full((1000,), end)
        found, counts = loss.landing(ends, ends, batch).unique(return_counts=True)
        assert found.tolist() == below
        assert (counts.float() / 1000 - 1 / len(below)).abs().max() < 0.002


# ---- Exact targets.


def moved_by_target(loss, index: list[int]) -> list[bool]:
    """Of which samples another output of the target network moves the loss."""
    rng, data = np.random.default_rng(7), make_data(3)
    student, teacher = Affine.random(rng, G), Affine.random(rng, G)
    data["index"] = np.array(index)
    batch, empty = make_batch(data, torch.float64)
    batch = replace(batch, uniforms=torch.full((B, 1), 0.9999))

    def value(*rows: int) -> float:
        networks, shift = Stock(student, teacher, told=True), torch.zeros(B, 1, 1, 1)
        shift[[*rows]] = 1.0
        networks.target = lambda *asked: networks.student(*asked) + shift
        return loss(batch, empty, networks).item()

    return [value(row) != value() for row in range(B)]


def test_at_an_edge_the_target_is_the_solvers_own_z():
    loss = loss_of("pcm", Setting("epsilon", "l2"))
    moved = moved_by_target(loss, [0, 12, 25, 37, 13, 49])
    assert moved == [False, False, False, False, True, True]
    grid = loss_of("tcd", Setting("epsilon", "l2"), target_steps=(4,))
    moved = moved_by_target(grid, [0, 12, 13, 25, 38, 49])  # 259 is the end of 13
    assert moved == [False, True, False, False, False, True]


def test_on_a_finer_grid_a_step_ends_at_the_edge():
    """Answers at 250 timesteps: a step of 20 from 741 would go past the edge at 739."""
    loss = replace(loss_of("pcm", Setting("epsilon", "l2")), grid=250)
    assert loss.intervals == 250
    index = torch.tensor([185, 184, 189, 190])  # starts at 743, 739, 759, 763
    start, end = solver_timesteps(index, 50, 1000, 250)
    assert start.tolist() == [743, 739, 759, 763]
    s = loss.landing(start, end, None)
    assert s.tolist() == [739, 499, 739, 739]
    seen = {}

    class Networks:
        def student(self, z, t, batch):
            return torch.zeros_like(z)

        def target(self, z, t, batch):
            seen["t"] = t
            return torch.zeros_like(z)

        def teacher(self, z, t, batch, empty):
            return torch.zeros_like(z), torch.zeros_like(z)

    data = make_data(3)
    data["index"] = np.array([185, 184, 189, 190, 0, 249])
    loss(*make_batch(data, torch.float64), Networks())
    assert seen["t"].tolist() == [739, 719, 739, 743, 0, 979]


@pytest.mark.parametrize(
    ("objective", "flags", "says"),
    [
        ("pcm", {"num_phases": 51}, r"^--num-phases 51 must be 1 to 50, the solver's --num-ddim"),
        ("tcd", {"target_steps": (4, 60)}, r"^--target-steps 60 must be 1 to 50, the solver's"),
    ],
)
def test_more_than_the_solver_has_is_refused(objective, flags, says):
    with pytest.raises(UserError, match=says):
        loss_of(objective, Setting("epsilon", "l2"), **flags)
    few = replace(Setting("epsilon", "l2"), num_ddim_timesteps=70)
    with pytest.raises(UserError, match="--num-ddim-timesteps 70 must divide 1000"):
        loss_of(objective, few)
