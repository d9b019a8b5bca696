"""Trajectory targets and LCF in NumPy and float64, from the papers; no code is shared with ours."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.support.lcd_reference import B, reference_abar

Landing = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass
class Setting:
    prediction_type: str
    loss_type: str
    huber_c: float = 1e-3
    num_ddim_timesteps: int = 50


def wide(values: np.ndarray) -> np.ndarray:
    return values[:, None, None, None]


class Process:
    """x0 and eps of an output, and the way back, at timesteps `[B]`."""

    def __init__(self, prediction_type: str) -> None:
        self.abar, self.velocity = reference_abar(), prediction_type == "v_prediction"

    def ab(self, t):
        return wide(np.sqrt(self.abar[t])), wide(np.sqrt(1 - self.abar[t]))

    def clean(self, out, z, t):
        a, b = self.ab(t)
        return a * z - b * out if self.velocity else (z - b * out) / a

    def noise(self, out, z, t):
        a, b = self.ab(t)
        return a * out + b * z if self.velocity else out

    def at(self, x0, eps, t):
        a, b = self.ab(t)
        return a * x0 + b * eps

    def moved(self, out, z, t, s):
        return self.at(self.clean(out, z, t), self.noise(out, z, t), s)

    def slope(self, t, s):
        """d moved / d out."""
        (a, b), (a_s, b_s) = self.ab(t), self.ab(s)
        return -a_s * b + b_s * a if self.velocity else -a_s * b / a + b_s


def compared(setting: Setting, d: np.ndarray) -> tuple[float, np.ndarray]:
    """The loss of a difference, and its gradient by it."""
    if setting.loss_type == "l2":
        return np.mean(d**2), 2 * d / d.size
    root = np.sqrt(d**2 + setting.huber_c**2)
    return np.mean(root - setting.huber_c), d / root / d.size


def timesteps(setting: Setting, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    k = 1000 // setting.num_ddim_timesteps
    late = k * (index + 1) - 1
    return late, np.maximum(late - k, 0)


def trajectory_reference(
    setting: Setting, data: dict, student, target, teacher, extra: dict, landing: Landing
):
    """Loss, its gradient by the student's output, the student's input, and its timesteps."""
    process = Process(setting.prediction_type)
    late, early = timesteps(setting, data["index"])
    s = landing(late, early)
    z = process.at(data["latents"], data["noise"], late)
    cond = teacher(z, late, data["text"], extra["cond"])
    uncond = teacher(z, late, np.repeat(data["empty"], B, 0), extra["uncond"])
    w = wide(data["w"])
    x0 = (1 + w) * process.clean(cond, z, late) - w * process.clean(uncond, z, late)
    eps = (1 + w) * process.noise(cond, z, late) - w * process.noise(uncond, z, late)
    z_hat = process.at(x0, eps, early)
    aim = process.moved(target(z_hat, early, data["text"], extra["student"]), z_hat, early, s)
    aim = np.where(wide(s == early), z_hat, aim)
    found = process.moved(student(z, late, data["text"], extra["student"]), z, late, s)
    loss, g = compared(setting, found - aim)
    return loss, g * process.slope(late, s), z, late


def lcf_reference(setting: Setting, data: dict, student, target, extra: dict, scaling: float):
    """Likewise for consistency fine-tuning: one noise, no teacher."""
    process = Process(setting.prediction_type)
    late, early = timesteps(setting, data["index"])

    def f(out, z, t):
        x = wide(scaling * t)
        return 0.25 / (x**2 + 0.25) * z + x / np.sqrt(x**2 + 0.25) * process.clean(out, z, t)

    z, z_early = (process.at(data["latents"], data["noise"], t) for t in (late, early))
    aim = f(target(z_early, early, data["text"], extra["student"]), z_early, early)
    found = f(student(z, late, data["text"], extra["student"]), z, late)
    loss, g = compared(setting, found - aim)
    a, b = process.ab(late)
    through = wide(scaling * late) / np.sqrt(wide(scaling * late) ** 2 + 0.25)
    return loss, g * through * (-b if process.velocity else -b / a), z, late
