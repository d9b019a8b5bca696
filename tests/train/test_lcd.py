"""The LCD loss and its gradient against a float64 NumPy reference that shares no code with it."""

import numpy as np
import pytest
import torch

from shared.diffusion import Schedule
from tests.support.lcd_reference import (
    SETTINGS,
    Affine,
    B,
    G,
    Setting,
    Stock,
    lcd_of,
    make_batch,
    make_data,
    reference,
    reference_abar,
    reference_guidance_embedding,
)


@pytest.mark.parametrize("told", [True, False], ids=["guidance-embedding", "no-embedding"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_and_gradient_equal_the_reference(setting, told):
    rng = np.random.default_rng(7)
    student, teacher = Affine.random(rng, G), Affine.random(rng, G)
    data = make_data(3, setting.num_ddim_timesteps)
    embedding = reference_guidance_embedding(data["w"] if told else np.zeros(B), G)
    zeros = np.zeros((B, G))
    extra = {"student": embedding, "cond": zeros, "uncond": zeros}
    loss, g, z, late = reference(setting, data, student, student, teacher, extra)
    gradient = student.gradient(g, z, late, data["text"], embedding)

    networks = Stock(student, teacher, told)
    lcd = lcd_of(setting, Schedule(torch.tensor(reference_abar()), setting.prediction_type))
    mine = lcd(*make_batch(data, torch.float64), networks)
    mine.backward()
    np.testing.assert_allclose(mine.item(), loss, rtol=1e-9)
    for name, parameter in networks.parameters.items():
        np.testing.assert_allclose(parameter.grad, gradient[name], rtol=1e-8, atol=1e-12)
    assert all(parameter.grad is None for parameter in networks.frozen.values())


def test_the_reference_gradient_is_one():
    """Finite differences: that the gradient written by hand belongs to the reference's loss."""
    setting, data = Setting("v_prediction", "huber", huber_c=0.1), make_data(5)
    rng = np.random.default_rng(1)
    student, target, teacher = (Affine.random(rng, G) for _ in range(3))
    embedding, zeros = reference_guidance_embedding(data["w"], G), np.zeros((B, G))
    extra = {"student": embedding, "cond": zeros, "uncond": zeros}
    _, g, z, late = reference(setting, data, student, target, teacher, extra)
    gradient = student.gradient(g, z, late, data["text"], embedding)
    for name, values in student.weights.items():
        index = tuple(size - 1 for size in values.shape)
        loss = []
        for step in (1e-6, -1e-6):
            values[index] += step
            loss.append(reference(setting, data, student, target, teacher, extra)[0])
            values[index] -= step
        assert (loss[0] - loss[1]) / 2e-6 == pytest.approx(gradient[name][index], rel=1e-5)
