"""The LCD loss and its gradient against a float64 NumPy reference that shares no code with it.

The networks are affine in z, t, text and guidance embedding, so their gradients can be written by
hand. The first half calls the loss alone in float64; the second runs the two kinds of student, with
affine networks in place of their UNets, in fp32 as they are trained.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import Schedule, schedule_from_config
from train.data.batch import Batch
from train.networks.full import FullStudent
from train.networks.lora import LoraStudent
from train.objectives.lcd import LCD

B, C, H, W, L, D, P, G = 6, 4, 3, 2, 3, 5, 4, 8
IDS = 6
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# ---- The reference: NumPy, float64, written from the papers.


def reference_abar() -> np.ndarray:
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def reference_guidance_embedding(w: np.ndarray, dim: int) -> np.ndarray:
    half = dim // 2
    angle = 1000 * np.outer(w, 10000.0 ** (-np.arange(half) / (half - 1)))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


@dataclass
class Affine:
    """out[b, c, h, w] = W[c] . z + V[c] . mean(text) + U[c] . extra + a[c] t / 1000 + bias[c]."""

    weights: dict[str, np.ndarray]

    @staticmethod
    def random(rng: np.random.Generator, extra: int) -> "Affine":
        shapes = {"W": (C, C), "V": (C, D), "U": (C, extra), "a": (C,), "bias": (C,)}
        return Affine({name: 0.4 * rng.standard_normal(s) for name, s in shapes.items()})

    def __call__(self, z, t, text, extra) -> np.ndarray:
        p = self.weights
        out = np.einsum("cd,bdhw->bchw", p["W"], z)
        row = text.mean(1) @ p["V"].T + extra @ p["U"].T + np.outer(t / 1000, p["a"]) + p["bias"]
        return out + row[:, :, None, None]

    def gradient(self, g, z, t, text, extra) -> dict[str, np.ndarray]:
        """Of the parameters, where g is the loss's gradient by the output."""
        row = g.sum((2, 3))
        return {
            "W": np.einsum("bchw,bdhw->cd", g, z),
            "V": row.T @ text.mean(1),
            "U": row.T @ extra,
            "a": row.T @ (t / 1000),
            "bias": row.sum(0),
        }


@dataclass
class Setting:
    prediction_type: str
    loss_type: str
    huber_c: float = 1e-3
    num_ddim_timesteps: int = 50
    timestep_scaling: float = 10.0


def reference(s: Setting, data: dict, student, target, teacher, extra: dict):
    """Loss, its gradient by the student's output, and the student's input: LCM's algorithm 1."""
    abar, k = reference_abar(), 1000 // s.num_ddim_timesteps
    late = k * (data["index"] + 1) - 1
    early = np.maximum(late - k, 0)

    def coefficients(t):
        a, b = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
        return a[:, None, None, None], b[:, None, None, None]

    def clean(out, z, t):
        a, b = coefficients(t)
        return (z - b * out) / a if s.prediction_type == "epsilon" else a * z - b * out

    def noise_of(out, z, t):
        a, b = coefficients(t)
        return out if s.prediction_type == "epsilon" else a * out + b * z

    def scalings(t):
        x = (s.timestep_scaling * t)[:, None, None, None]
        return 0.25 / (x**2 + 0.25), x / np.sqrt(x**2 + 0.25)

    def f(out, z, t):
        skip, through = scalings(t)
        return skip * z + through * clean(out, z, t)

    a, b = coefficients(late)
    z = a * data["latents"] + b * data["noise"]
    w = data["w"][:, None, None, None]
    cond = teacher(z, late, data["text"], extra["cond"])
    uncond = teacher(z, late, np.repeat(data["empty"], B, 0), extra["uncond"])
    x0 = (1 + w) * clean(cond, z, late) - w * clean(uncond, z, late)
    eps = (1 + w) * noise_of(cond, z, late) - w * noise_of(uncond, z, late)
    a_early, b_early = coefficients(early)
    z_hat = a_early * x0 + b_early * eps
    aim = f(target(z_hat, early, data["text"], extra["student"]), z_hat, early)
    d = f(student(z, late, data["text"], extra["student"]), z, late) - aim
    if s.loss_type == "l2":
        loss, slope = np.mean(d**2), 2 * d
    else:
        root = np.sqrt(d**2 + s.huber_c**2)
        loss, slope = np.mean(root - s.huber_c), d / root
    by_output = -b / a if s.prediction_type == "epsilon" else -b
    g = slope / d.size * scalings(late)[1] * by_output
    return loss, g, z, late


def make_data(seed: int, num_ddim_timesteps: int = 50) -> dict:
    rng = np.random.default_rng(seed)
    n = num_ddim_timesteps
    return {
        "latents": rng.standard_normal((B, C, H, W)),
        "noise": rng.standard_normal((B, C, H, W)),
        "text": rng.standard_normal((B, L, D)).astype(np.float16).astype(float),
        "empty": rng.standard_normal((1, L, D)).astype(np.float16).astype(float),
        "pooled": rng.standard_normal((B, P)).astype(np.float16).astype(float),
        "empty_pooled": rng.standard_normal((1, P)).astype(np.float16).astype(float),
        "time_ids": rng.integers(0, 1024, (B, IDS)),
        # 0 is the interval that ends at t_n = 0, n - 1 the one that starts in near pure noise.
        "index": np.array([0, 1, n // 3, n // 2, n - 2, n - 1]),
        "w": np.array([0.0, 1.0, 2.5, 5.0, 7.25, 14.0]),
    }


def make_batch(data: dict, dtype: torch.dtype, xl: bool = False) -> tuple[Batch, TextEmbeds]:
    def to(name: str, kind: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(data[name]).to(kind)

    text = torch.float16 if dtype == torch.float32 else dtype
    batch = Batch(
        latents=to("latents", dtype),
        prompt_embeds=to("text", text),
        pooled_prompt_embeds=to("pooled", text) if xl else None,
        time_ids=to("time_ids", torch.int32) if xl else None,
        noise=to("noise", dtype),
        index=to("index", torch.int64),
        w=to("w", dtype),
    )
    return batch, TextEmbeds(to("empty", text), to("empty_pooled", text) if xl else None)


def lcd_of(s: Setting, schedule: Schedule) -> LCD:
    return LCD(schedule, s.num_ddim_timesteps, s.timestep_scaling, s.loss_type, s.huber_c)


SETTINGS = [
    pytest.param(Setting(p, loss, **more), id=f"{p}-{name}")
    for p in ("epsilon", "v_prediction")
    for name, loss, more in [
        ("l2", "l2", {}),
        ("huber", "huber", {}),
        ("huber-wide", "huber", {"huber_c": 0.3, "num_ddim_timesteps": 20}),
        ("l2-scaling", "l2", {"timestep_scaling": 0.01}),
    ]
]


# ---- The loss alone, float64.


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


# ---- The students as they are trained: fp32, through `call_unet` and `twice`.


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
