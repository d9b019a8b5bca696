"""The LCD loss and its gradient against a float64 NumPy reference that shares no code with it."""

import numpy as np
import pytest
import torch
from torch import nn

from shared.diffusion import Schedule
from tests.support.lcd_reference import (
    SETTINGS,
    Affine,
    B,
    D,
    G,
    L,
    Setting,
    lcd_of,
    make_batch,
    make_data,
    reference,
    reference_abar,
    reference_guidance_embedding,
)


class Stock:
    """`Networks` of affine functions of (z, t, text, guidance embedding), all with gradients on,
    so that the loss itself must stop those of target and teacher."""

    def __init__(self, student: Affine, teacher: Affine, told: bool) -> None:
        self.told = told
        self.parameters = {k: nn.Parameter(torch.tensor(v)) for k, v in student.weights.items()}
        self.frozen = {k: nn.Parameter(torch.tensor(v)) for k, v in teacher.weights.items()}

    def compute(self, p, z, t, text, extra):
        out = torch.einsum("cd,bdhw->bchw", p["W"], z)
        row = text.mean(1) @ p["V"].T + extra @ p["U"].T + torch.outer(t / 1000, p["a"]) + p["bias"]
        return out + row[:, :, None, None]

    def student(self, z, t, batch):
        w = batch.w.numpy() if self.told else np.zeros(B)
        extra = torch.tensor(reference_guidance_embedding(w, G))
        return self.compute(self.parameters, z, t.double(), batch.prompt_embeds, extra)

    target = student

    def teacher(self, z, t, batch, empty):
        nothing = torch.zeros(B, G, dtype=torch.float64)
        rows = empty.prompt_embeds.expand(B, L, D)
        return tuple(
            self.compute(self.frozen, z, t.double(), text, nothing)
            for text in (batch.prompt_embeds, rows)
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
