"""Distribution matching in NumPy and float64, written from the papers; shares no code with ours.

Networks are affine, so that their gradients can be written by hand (`lcd_reference.Affine`). The
head's logit of a sample is sum_c q_c mean(z_c^2): not affine, so that its slope depends on z.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tests.support.lcd_reference import Affine, B, C, D, H, L, W, reference_abar
from train.data.batch import Batch

NOTHING = np.zeros((B, 1))  # what these networks are told besides


@dataclass
class Setting:
    prediction_type: str
    steps: int = 1
    gan_weight: float = 0.0
    scaling: float = 10.0


@dataclass
class Networks:
    student: Affine
    teacher: Affine
    fake: Affine
    q: np.ndarray  # of the head


def make_networks(seed: int) -> Networks:
    rng = np.random.default_rng(seed)
    return Networks(*(Affine.random(rng, 1) for _ in range(3)), 0.02 * rng.standard_normal(C))


def make_data(seed: int, steps: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.standard_normal((B, C, H, W)),
        "noise": rng.standard_normal((B, C, H, W)),
        "noises": rng.standard_normal((B, steps + 1, C, H, W)),
        "uniforms": np.append(rng.random((B - 2, 2)), [[0.0, 0.0], [0.9999, 0.9999]], axis=0),
        "text": rng.standard_normal((B, L, D)).astype(np.float16).astype(float),
        "empty": rng.standard_normal((1, L, D)).astype(np.float16).astype(float),
        "index": np.arange(B) % steps,
        "w": np.linspace(0, 7, B),
    }


class Reference:
    """What a step computes, by the letters of the papers."""

    def __init__(self, setting: Setting, data: dict, networks: Networks) -> None:
        self.s, self.data, self.n, self.abar = setting, data, networks, reference_abar()

    def at(self, t):
        a, b = np.sqrt(self.abar[t]), np.sqrt(1 - self.abar[t])
        return a[:, None, None, None], b[:, None, None, None]

    def clean(self, out, z, t):
        a, b = self.at(t)
        return (z - b * out) / a if self.s.prediction_type == "epsilon" else a * z - b * out

    def picture(self, z, t):
        """LCM's consistency function of the student's output."""
        x = (self.s.scaling * t)[:, None, None, None]
        skip, through = 0.25 / (x**2 + 0.25), x / np.sqrt(x**2 + 0.25)
        out = self.n.student(z, t, self.data["text"], NOTHING)
        return skip * z + through * self.clean(out, z, t)

    def slope_of_picture(self, t):
        """Of the picture by the student's output."""
        x = (self.s.scaling * t)[:, None, None, None]
        a, b = self.at(t)
        return x / np.sqrt(x**2 + 0.25) * (-b / a if self.s.prediction_type == "epsilon" else -b)

    def start(self):
        """Each sample by itself through the steps before its own."""
        n = self.s.steps
        times = np.array([(n - i) * (1000 // n) - 1 for i in range(n)])
        z = np.empty_like(self.data["noise"])
        for row, own in enumerate(self.data["index"]):
            now = self.data["noise"].copy()
            for step in range(own):
                x = self.picture(now, np.full(B, times[step]))
                a, b = self.at(np.array([times[step + 1]]))
                now = a * x + b * self.data["noises"][:, step]
            z[row] = now[row]
        return z, times[self.data["index"]]

    def logits(self, z):
        return (z**2).mean((2, 3)) @ self.n.q

    def student(self):
        """The student's loss, its gradient by the student's weights, and DMD's gradient at x."""
        data, text = self.data, self.data["text"]
        z, t = self.start()
        x = self.picture(z, t)
        tau = np.minimum(20 + np.floor(data["uniforms"][:, 0] * 961).astype(int), 980)
        a, b = self.at(tau)
        noised = a * x + b * data["noises"][:, -2]
        w = data["w"][:, None, None, None]
        cond = self.clean(self.n.teacher(noised, tau, text, NOTHING), noised, tau)
        empty = np.repeat(data["empty"], B, 0)
        uncond = self.clean(self.n.teacher(noised, tau, empty, NOTHING), noised, tau)
        real = (1 + w) * cond - w * uncond
        fake = self.clean(self.n.fake(noised, tau, text, NOTHING), noised, tau)
        gradient = (fake - real) / np.abs(x - real).mean((1, 2, 3), keepdims=True)
        loss, by_x = 0.5 * np.mean(gradient**2), gradient / gradient.size
        if self.s.gan_weight:
            logits = self.logits(noised)
            loss += self.s.gan_weight * np.mean(np.log1p(np.exp(-logits)))
            by_logit = -1 / (1 + np.exp(logits)) / B
            by_z = 2 * noised * self.n.q[:, None, None] / (H * W)
            by_x = by_x + self.s.gan_weight * by_logit[:, None, None, None] * by_z * a
        by_output = by_x * self.slope_of_picture(t)
        return loss, self.n.student.gradient(by_output, z, t, text, NOTHING), gradient

    def fake(self):
        """The fake score's loss, its gradient by its weights and by the head's."""
        data, s = self.data, self.s
        x = self.picture(*self.start())
        tau = np.minimum(np.floor(data["uniforms"][:, 1] * 1000).astype(int), 999)
        (a, b), noise = self.at(tau), data["noises"][:, -1]
        z, real = a * x + b * noise, a * data["latents"] + b * noise
        wanted = noise if s.prediction_type == "epsilon" else a * noise - b * x
        error = self.n.fake(z, tau, data["text"], NOTHING) - wanted
        gradient = self.n.fake.gradient(2 * error / error.size, z, tau, data["text"], NOTHING)
        mine, theirs = self.logits(z), self.logits(real)
        gan = np.mean(np.log1p(np.exp(mine))) + np.mean(np.log1p(np.exp(-theirs)))
        # Twice the student's weight, and the mean over both kinds is half their sum.
        loss = np.mean(error**2) + 2 * s.gan_weight * gan
        by_mine, by_theirs = 1 / (1 + np.exp(-mine)) / B, -1 / (1 + np.exp(theirs)) / B
        by_q = by_mine @ (z**2).mean((2, 3)) + by_theirs @ (real**2).mean((2, 3))
        return loss, gradient, 2 * s.gan_weight * by_q


class Torch:
    """The same networks, as the loss calls them."""

    def __init__(self, networks: Networks, gan: bool) -> None:
        self.weights = {
            name: nn.ParameterDict(
                {key: nn.Parameter(torch.tensor(value)) for key, value in part.weights.items()}
            )
            for name, part in vars(networks).items()
            if name != "q"
        }
        self.q = nn.Parameter(torch.tensor(networks.q)) if gan else None
        self.asked: list[str] = []

    def _call(self, name, z, t, text):
        p = self.weights[name]
        self.asked.append(name)
        out = torch.einsum("cd,bdhw->bchw", p["W"], z)
        row = text.double().mean(1) @ p["V"].T + torch.outer(t.double() / 1000, p["a"]) + p["bias"]
        return out + row[:, :, None, None]

    def student(self, z, t, batch):
        return self._call("student", z, t, batch.prompt_embeds)

    @torch.no_grad()
    def target(self, z, t, batch):
        return self._call("student", z, t, batch.prompt_embeds)

    @torch.no_grad()
    def teacher(self, z, t, batch, empty):
        uncond = self._call("teacher", z, t, empty.prompt_embeds.expand(len(z), -1, -1))
        return self._call("teacher", z, t, batch.prompt_embeds), uncond

    def fake(self, z, t, batch, *real):
        logits = None
        if self.q is not None:
            logits = torch.cat([(one**2).mean((2, 3)) @ self.q for one in (z, *real)])
        return self._call("fake", z, t, batch.prompt_embeds), logits

    learning_fake = fake


def make_batch(data: dict) -> tuple[Batch, torch.Tensor]:
    def to(name: str) -> torch.Tensor:
        return torch.from_numpy(data[name])

    return Batch(
        latents=to("latents"), prompt_embeds=to("text"), pooled_prompt_embeds=None, time_ids=None,
        noise=to("noise"), index=to("index"), w=to("w"), uniforms=to("uniforms"),
        noises=to("noises"),
    )  # fmt: skip
