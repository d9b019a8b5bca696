"""A picture becomes noise and noise a picture, DDIM's way, by stock pipelines.

Guidance is off throughout: with it the way back is another one than the way there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from numpy.typing import NDArray
from torch import Tensor

from shared.diffusion import SCHEDULE
from shared.errors import UserError
from shared.models.family import SCHEDULER_CONFIG, Model, load_config
from shared.models.vae import decode_latents

Step = Callable[[], object]  # called after each pass of the UNet


@dataclass(frozen=True)
class Prompt:
    """A prompt's embeddings `[1, L, D]` and, for SDXL, pooled `[1, P]`."""

    embeds: Tensor
    pooled: Tensor | None = None

    def arguments(self) -> dict[str, Tensor]:
        """Under the names that pipelines have for them."""
        given = {"prompt_embeds": self.embeds}
        return given if self.pooled is None else {**given, "pooled_prompt_embeds": self.pooled}


@dataclass(frozen=True)
class Trajectory:
    """DDIM's way between a picture and its noise, in so many steps each way."""

    there: DDIMInverseScheduler
    back: DDIMScheduler
    steps: int


def trajectory_of(model: Model, steps: int) -> Trajectory:
    """The way of a model's own noise schedule, whose steps lie as `--objective denoise` has them.

    Raises UserError for more steps than the schedule has.
    """
    config = {**SCHEDULE, **load_config(model.source, SCHEDULER_CONFIG)}
    most = int(config["num_train_timesteps"])
    if steps > most:
        raise UserError(f"--steps {steps} must be 1 to {most}, all that the model's schedule has")
    options = {"timestep_spacing": "trailing", "clip_sample": False}
    return Trajectory(
        there=DDIMInverseScheduler.from_config(config, **options),
        back=DDIMScheduler.from_config(config, **options),
        steps=steps,
    )


def encode_prompt(pipe: Any, text: str) -> Prompt:
    """What the pipeline's text encoders make of a prompt."""
    given = {"prompt": text, "device": pipe.device, "num_images_per_prompt": 1}
    embeds, _, *pooled = pipe.encode_prompt(**given, do_classifier_free_guidance=False)
    return Prompt(embeds, pooled[0] if pooled else None)


@torch.inference_mode()
def encode_picture(pipe: Any, pixels: NDArray[np.uint8]) -> Tensor:
    """The scaled mean latents `[1, C, h, w]`, fp32 on the CPU, of `[H, W, 3]`."""
    vae = pipe.vae
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    mean: Tensor = vae.encode(image.to(vae.device, vae.dtype)).latent_dist.mean
    return mean.float().cpu() * float(vae.config.scaling_factor)


def decode(pipe: Any, latents: Tensor) -> NDArray[np.uint8]:
    """The picture `[H, W, 3]` of scaled latents `[1, C, h, w]`."""
    pixels: NDArray[np.uint8]
    (pixels,) = decode_latents(pipe.vae, latents / pipe.vae.config.scaling_factor)
    return pixels


def invert(pipe: Any, way: Trajectory, latents: Tensor, prompt: Prompt, on_step: Step) -> Tensor:
    """The noise `[1, C, h, w]`, fp32, that leads to these latents."""
    return walk(pipe, way.there, way.steps, latents, prompt, on_step)


def redraw(
    pipe: Any, way: Trajectory, noise: Tensor, prompt: Prompt, on_step: Step, eta: float = 0.0
) -> Tensor:
    """The latents `[1, C, h, w]`, fp32, that a noise leads to; with `eta` by way of fresh noise.

    Raises UserError where they are not finite.
    """
    found = walk(pipe, way.back, way.steps, noise, prompt, on_step, eta)
    if not found.isfinite().all():
        raise UserError(f"what is drawn is not finite in {pipe.dtype}; give --dtype float32")
    return found


def walk(
    pipe: Any,
    scheduler: Any,
    steps: int,
    latents: Tensor,
    prompt: Prompt,
    on_step: Step,
    eta: float = 0.0,
) -> Tensor:
    """Let the stock pipeline go a scheduler's way, from latents to latents, fp32 on the CPU."""

    def after_step(_pipe: Any, _step: int, _t: Any, changed: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return changed

    pipe.scheduler = scheduler
    side = {"height": latents.shape[-2], "width": latents.shape[-1]}
    answer = pipe(
        **prompt.arguments(),
        **{name: size * pipe.vae_scale_factor for name, size in side.items()},
        latents=latents.to(pipe.device, pipe.dtype),
        num_inference_steps=steps,
        guidance_scale=1.0,
        eta=eta,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=after_step,
        output_type="latent",
    )
    found: Tensor = answer.images
    return found.float().cpu()


def noise_of(latents: Tensor, seed: int) -> Tensor:
    """Plain noise of the latents' shape, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(latents.shape, generator=generator)


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal to noise ratio of 8-bit pixels in dB: 10 log10(255^2 / mean squared error)."""
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)
