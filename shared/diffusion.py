"""The formulas of diffusion and of latent consistency distillation, as pure functions.

Equation numbers: LCM is arXiv 2310.04378, DDIM is arXiv 2010.02502, v-prediction is arXiv
2202.00512. z_t = alpha_t x0 + sigma_t eps with alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t).

All of it runs in the dtype of its inputs; callers pass fp32 whatever the network's precision
(sigma formed in bf16 is wrong by up to 4.8% at small t). Per-sample coefficients have shape `[B]`
and are broadcast over `[B, C, h, w]` by `expand`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What of a scheduler's config decides the noise schedule, with the defaults of diffusers' DDPM.
SCHEDULE = {
    "prediction_type": "epsilon", "num_train_timesteps": 1000, "beta_schedule": "linear",
    "beta_start": 1e-4, "beta_end": 0.02, "trained_betas": None, "rescale_betas_zero_snr": False,
}  # fmt: skip
NO_BETAS = ("EDM", "FlowMatch")  # schedulers of another formulation, by their class
PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Schedule:
    """A teacher's noise schedule: `alphas_cumprod` `[T]` (abar) in fp32 and what it predicts."""

    alphas_cumprod: Tensor
    prediction_type: str

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Schedule:
        """Return the same schedule elsewhere."""
        return Schedule(self.alphas_cumprod.to(device, dtype), self.prediction_type)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t at integer timesteps `t` `[B]`, each `[B]`."""
        abar = self.alphas_cumprod[t]
        return abar.sqrt(), (1 - abar).sqrt()


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """Read the schedule in a diffusers `scheduler_config.json`.

    Raises ValueError for a scheduler without betas, for a beta schedule or a prediction type that
    is not known here, and for noise prediction with zero terminal SNR: there z is the noise itself,
    and x0 would be 0 / 0.
    """
    if str(config.get("_class_name")).startswith(NO_BETAS):
        raise ValueError(
            f"its scheduler, {config['_class_name']}, has no beta schedule; teachers here are "
            "trained on one (DDPM, DDIM, PNDM, Euler and their like)"
        )
    config = {**SCHEDULE, **config}
    count = int(config["num_train_timesteps"])
    start, end = float(config["beta_start"]), float(config["beta_end"])
    kind, prediction = config["beta_schedule"], str(config["prediction_type"])
    if config["trained_betas"] is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    else:
        raise ValueError(f"beta_schedule {kind!r} is not one of scaled_linear, linear")
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {prediction!r} is not one of {PREDICTION_TYPES}")
    if config["rescale_betas_zero_snr"]:
        betas = rescale_zero_terminal_snr(betas)
    abar = torch.cumprod(1 - betas, dim=0)
    if prediction == "epsilon" and abar[-1] == 0:
        raise ValueError(
            "zero terminal SNR (rescale_betas_zero_snr) with prediction_type epsilon leaves x0 "
            "undefined at the last step; such teachers predict v: correct scheduler_config.json"
        )
    return Schedule(abar, prediction)


def schedule_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a scheduler's config decides z_t and what its teacher predicts."""
    return {name: config.get(name, default) for name, default in SCHEDULE.items()}


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that it ends at zero (arXiv 2305.08891, algorithm 1)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    abar = root**2
    alphas = torch.cat([abar[:1], abar[1:] / abar[:-1]])
    return 1 - alphas


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Reshape `[B]` to `[B, 1, 1, 1]`, ready to multiply `like`."""
    return coefficient.view(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return z_t = alpha_t x0 + sigma_t eps (LCM, eq. 2)."""
    return expand(alpha, x0) * x0 + expand(sigma, x0) * noise


def velocity(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return v = alpha_t eps - sigma_t x0 (arXiv 2202.00512, appendix D)."""
    return expand(alpha, x0) * noise - expand(sigma, x0) * x0


def diffusion_target(
    x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    """Return what a denoiser ought to say of z_t: the noise, or the velocity."""
    if prediction_type == "epsilon":
        return noise
    return velocity(x0, noise, alpha, sigma)


def predicted_x0(
    output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    """Return the clean latents an output implies: (z - sigma eps) / alpha, or alpha z - sigma v."""
    alpha, sigma = expand(alpha, z), expand(sigma, z)
    if prediction_type == "epsilon":
        return (z - sigma * output) / alpha
    return alpha * z - sigma * output


def predicted_eps(
    output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    """Return the noise a network's output implies: eps itself, or alpha v + sigma z."""
    if prediction_type == "epsilon":
        return output
    return expand(alpha, z) * output + expand(sigma, z) * z


def guided(cond: Tensor, uncond: Tensor, w: Tensor) -> Tensor:
    """Return cond + w (cond - uncond), w `[B]` (LCM, eq. 13); diffusers says w + 1."""
    return cond + expand(w, cond) * (cond - uncond)


def ddim_step(x0: Tensor, eps: Tensor, alpha_prev: Tensor, sigma_prev: Tensor) -> Tensor:
    """Return the deterministic DDIM step to the earlier time (DDIM, eq. 12 with eta = 0).

    From a network's own x0 and eps it is Phi of the trajectory methods, however far it goes.
    """
    return expand(alpha_prev, x0) * x0 + expand(sigma_prev, x0) * eps


def solver_timesteps(
    index: Tensor, num_ddim_timesteps: int, total: int, grid: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return t_{n+k} and t_n of solver interval `index` in 0..N-1.

    k = T / N; t_{n+k} = k (index + 1) - 1 and t_n = max(t_{n+k} - k, 0), where abar[0] is used.
    On a finer `grid` of timesteps than the solver's N, index counts those, and k remains T / N.
    """
    k = total // num_ddim_timesteps
    start = (index + 1) * (total // (grid or num_ddim_timesteps)) - 1
    return start, (start - k).clamp(min=0)


def phase_edges(num_phases: int, num_ddim_timesteps: int, total: int) -> Tensor:
    """Return the lower edges of the phases of PCM (arXiv 2405.18407), `[M]`, ascending from 0.

    Phase i of M begins with the solver's interval floor(i N / M), that is at timestep
    k floor(i N / M) - 1, or 0 for the first. For 4 phases of 50 intervals: 0, 239, 499, 739.
    """
    k = total // num_ddim_timesteps
    first = torch.arange(num_phases) * num_ddim_timesteps // num_phases
    return (k * first - 1).clamp(min=0)


def schedule_targets(steps: int, num_ddim_timesteps: int, total: int) -> Tensor:
    """Return where the steps of a schedule end that LCMScheduler and TCDScheduler would take.

    Ascending from 0; the schedule begins at T - 1. For 4 steps of 50 intervals: 0, 259, 499, 759.
    """
    k = total // num_ddim_timesteps
    taken = torch.arange(1, steps) * num_ddim_timesteps // steps  # intervals from the noisy end
    inner = k * (num_ddim_timesteps - taken) - 1
    return torch.cat([torch.zeros(1, dtype=torch.int64), inner.flip(0)])


def nearest_divisor(steps: int, total: int) -> int:
    """Return the number of steps nearest to `steps` that divides `total` timesteps evenly."""
    divisors = (n for n in range(1, total + 1) if not total % n)
    return min(divisors, key=lambda n: abs(n - steps))


def boundary_scalings(
    t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Return c_skip and c_out, each `[B]` (LCM, appendix C), so that f(z, 0) = z.

    With s = timestep_scaling * t: c_skip = sd^2 / (s^2 + sd^2), c_out = s / sqrt(s^2 + sd^2).
    """
    s = timestep_scaling * t
    square = s**2 + sigma_data**2
    return sigma_data**2 / square, s / square.sqrt()


def consistency(z: Tensor, x0: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """Return f(z, t) = c_skip z + c_out x0 (LCM, eq. 9)."""
    return expand(c_skip, z) * z + expand(c_out, z) * x0


def guidance_embedding(w: Tensor, dim: int = 256) -> Tensor:
    """Return [sin, cos](1000 w 10000^(-j / (dim/2 - 1))), `[B, dim]`, as diffusers' LCM does."""
    half = dim // 2
    frequency = torch.exp(
        torch.arange(half, dtype=w.dtype, device=w.device) * (-math.log(10000.0) / (half - 1))
    )
    angle = 1000.0 * w[:, None] * frequency[None, :]
    return torch.nn.functional.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, dim % 2))


def l2_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return mean squared difference, a scalar."""
    return ((a - b) ** 2).mean()


def huber_distance(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Return mean pseudo-Huber distance sqrt(d^2 + c^2) - c, a scalar (arXiv 2310.14189, eq. 8)."""
    return (((a - b) ** 2 + c**2).sqrt() - c).mean()
