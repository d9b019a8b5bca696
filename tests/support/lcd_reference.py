"""The LCD loss in NumPy and float64, written from the papers; shares no code with ours."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import Schedule
from train.data.batch import Batch
from train.objectives.lcd import LCD

B, C, H, W, L, D, P, G = 6, 4, 3, 2, 3, 5, 4, 8
IDS = 6


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
