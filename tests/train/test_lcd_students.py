"""Both kinds of student, as they are trained, follow the reference of the LCD loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from shared.diffusion import schedule_from_config
from tests.support.lcd_reference import (
    IDS,
    SETTINGS,
    Affine,
    B,
    G,
    P,
    Setting,
    lcd_of,
    make_batch,
    make_data,
    reference,
    reference_guidance_embedding,
)
from train.networks.full import FullStudent
from train.networks.lora import LoraStudent

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class AffineUNet(nn.Module):
    """Called as diffusers' UNet is. With `lora`, the weights have a part that can be taken away."""

    def __init__(self, weights: Affine, lora: Affine | None = None) -> None:
        super().__init__()
        self.base = nn.ParameterDict(self._parameters_of(weights, trainable=lora is None))
        self.lora = nn.ParameterDict(self._parameters_of(lora, trainable=True) if lora else {})
        self._disable_adapters = False

    @staticmethod
    def _parameters_of(weights: Affine, trainable: bool) -> dict[str, nn.Parameter]:
        return {
            name: nn.Parameter(torch.tensor(value, dtype=torch.float32), requires_grad=trainable)
            for name, value in weights.weights.items()
        }

    def forward(self, z, t, text, timestep_cond=None, added_cond_kwargs=None):
        p = dict(self.base)
        if self.lora and not self._disable_adapters:
            p = {name: value + self.lora[name] for name, value in p.items()}
        out = torch.einsum("cd,bdhw->bchw", p["W"], z)
        parts = [] if timestep_cond is None else [timestep_cond]
        if added_cond_kwargs is not None:
            parts += [added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"] / 1000]
        missing = p["U"].shape[1] - sum(part.shape[1] for part in parts)
        extra = torch.cat([torch.zeros(len(z), missing), *parts], 1)
        row = text.mean(1) @ p["V"].T + extra @ p["U"].T + torch.outer(t / 1000, p["a"]) + p["bias"]
        return SimpleNamespace(sample=out + row[:, :, None, None])


def added(data: dict, xl: bool, empty: bool) -> np.ndarray:
    """What SDXL's UNet is told beside the text; the same time ids for the empty prompt."""
    if not xl:
        return np.zeros((B, 0))
    pooled = np.repeat(data["empty_pooled"], B, 0) if empty else data["pooled"]
    return np.hstack([pooled, data["time_ids"] / 1000])


def padded(part: np.ndarray, width: int) -> np.ndarray:
    """Aligned to the right, as AffineUNet reads U."""
    return np.pad(part, ((0, 0), (width - part.shape[1], 0)))


def around(kind: type, **attributes: object):
    """A student of that kind around given networks, without loading a teacher."""
    student = object.__new__(kind)
    vars(student).update(attributes, live=attributes["unet"])
    return student


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "xl"])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_both_students_train_by_the_reference(setting, kind, xl):
    rng = np.random.default_rng(11)
    width = G + P + IDS
    teacher, student, target = (Affine.random(rng, width) for _ in range(3))
    data = make_data(4, setting.num_ddim_timesteps)
    told = reference_guidance_embedding(data["w"], G) if kind == "full" else np.zeros((B, 0))
    extra = {
        "student": padded(np.hstack([told, added(data, xl, empty=False)]), width),
        "cond": padded(added(data, xl, empty=False), width),
        "uncond": padded(added(data, xl, empty=True), width),
    }
    if kind == "full":
        unet = AffineUNet(student)
        networks = around(
            FullStudent,
            unet=unet,
            dim=G,
            decay=0.95,
            target_unet=AffineUNet(target),
            teacher_unet=AffineUNet(teacher),
        )
        moved = unet.base
    else:
        unet = AffineUNet(teacher, lora=student)
        networks = around(LoraStudent, unet=unet, layers=[unet])
        moved = unet.lora
        total = {k: teacher.weights[k] + student.weights[k] for k in teacher.weights}
        student = target = Affine(total)
    loss, g, z, late = reference(setting, data, student, target, teacher, extra)
    gradient = student.gradient(g, z, late, data["text"], extra["student"])

    schedule = schedule_from_config({**SD, "prediction_type": setting.prediction_type})
    lcd = lcd_of(setting, schedule)
    batch, empty = make_batch(data, torch.float32, xl)
    mine = lcd(batch, empty, networks)
    mine.backward()
    assert mine.dtype == torch.float32
    np.testing.assert_allclose(mine.item(), loss, rtol=2e-4)
    for name, parameter in moved.items():
        scale = abs(gradient[name]).max()
        np.testing.assert_allclose(parameter.grad, gradient[name], rtol=2e-3, atol=2e-4 * scale)
    assert unet._disable_adapters is False
    modules = [value for value in vars(networks).values() if isinstance(value, nn.Module)]
    trained = set(map(id, moved.values()))
    others = [p for module in modules for p in module.parameters() if id(p) not in trained]
    assert others
    assert all(parameter.grad is None for parameter in others)


def test_formulas_stay_fp32_under_autocast():
    """Only the networks compute in bf16: what they are given and what is compared is fp32."""
    seen = []

    class Watching(AffineUNet):
        def forward(self, z, t, text, **more):
            seen.append(z)
            answer = super().forward(z, t, text, **more)
            return SimpleNamespace(sample=answer.sample.bfloat16())

    rng = np.random.default_rng(2)
    teacher, student = Affine.random(rng, G), Affine.random(rng, G)
    networks = around(
        FullStudent,
        unet=Watching(student),
        dim=G,
        decay=0.95,
        target_unet=Watching(student),
        teacher_unet=Watching(teacher),
    )
    setting, data = Setting("epsilon", "huber"), make_data(4)
    lcd = lcd_of(setting, schedule_from_config(SD))
    with torch.autocast("cpu", torch.bfloat16):
        loss = lcd(*make_batch(data, torch.float32), networks)
    assert loss.dtype == torch.float32
    assert {z.dtype for z in seen} == {torch.float32}
    _, _, z, _ = reference(
        setting,
        data,
        student,
        student,
        teacher,
        {"student": np.zeros((B, G)), "cond": np.zeros((B, G)), "uncond": np.zeros((B, G))},
    )
    np.testing.assert_allclose(seen[0], z, rtol=1e-4, atol=1e-5)  # bf16 would be off by 1e-2
