"""One call of the stock pipeline for each picture, whose noise is its own.

So a picture is the same whatever else is drawn beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from infer.draw.job import Job
from infer.pipelines.timing import seconds_per_pass
from shared.errors import UserError

DECODING = 3  # a picture's decoding, in passes of the UNet: 2.5 TFLOP to 0.8 for SD 1.5 at 512 px


def draw_one(
    pipe: Any, job: Job, prompt: str, seed: int, on_step: Callable[[], None]
) -> NDArray[np.uint8]:
    """Draw pixels `[H, W, 3]`. Raises UserError where they are not finite."""

    def after_step(_pipe: Any, _step: int, _t: Any, changed: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return changed

    answer = pipe(
        prompt=prompt,
        generator=torch.Generator().manual_seed(seed),  # on the CPU: the same on every device
        callback_on_step_end=after_step,
        output_type="np",
        **arguments(pipe, job),
    )
    if not np.isfinite(answer.images).all():
        remedy = "lower the scales of the LoRAs, or the guidance"
        if job.dtype != "float32":
            remedy = "give --dtype float32"
        raise UserError(f"the picture of seed {seed} is not finite in {job.dtype}; {remedy}")
    picture = pipe.numpy_to_pil(answer.images)[0]
    if job.given.mask is not None:  # the VAE would change what stays, too
        picture = pipe.image_processor.apply_overlay(job.given.mask, job.given.image, picture)
    return np.asarray(picture)


def arguments(pipe: Any, job: Job) -> dict[str, Any]:
    """What a pipeline of its kind is called with, besides prompt and noise."""
    known = inspect.signature(pipe.__call__).parameters
    width, height = job.size
    wanted = {"height": height, "width": width, "eta": job.eta}
    given: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    given |= {
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance_scale if job.folded is None else 1.0,
        "negative_prompt": job.negative_prompt,
        "clip_skip": job.clip_skip or None,
        **pictures(job),
    }
    if job.given.control is not None:
        given["controlnet_conditioning_scale"] = job.control_scale
    if job.strength is not None:
        given["strength"] = job.strength
    return given


def pictures(job: Job) -> dict[str, Image.Image]:
    """The pictures under the names that diffusers gives them, which depend on what is there."""
    given = job.given
    named = {"image": given.image, "mask_image": given.mask, "control_image": given.control}
    if given.image is None:
        named = {"image": given.control}
    return {name: picture for name, picture in named.items() if picture is not None}


def steps_taken(pipe: Any, job: Job) -> int:
    """How often the scheduler steps for a picture; fewer than asked for from a picture."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(job.steps)
    all_steps = len(scheduler.timesteps)
    if job.strength is None:
        return all_steps
    skipped: int = max(job.steps - min(int(job.steps * job.strength), job.steps), 0)
    return all_steps - skipped * int(scheduler.order)


def seconds_expected(pipe: Any, job: Job, steps: int) -> float:
    """About how long the whole job will take."""
    width, height = (side // pipe.vae_scale_factor for side in job.size)
    one = seconds_per_pass(pipe.unet, height, width)
    return job.count * (steps * job.passes + DECODING) * one
