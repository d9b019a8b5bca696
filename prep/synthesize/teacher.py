"""The teacher, drawing batches of a fixed shape.

A sample's noise comes from a generator of its own, on the CPU, and the last batch is padded: which
samples share a batch does not show in the latents.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prep.encoders.text import TextEncoder
from prep.synthesize.keeping import SPACING, Recorder
from shared.cache.conditioning import TextEmbeds
from shared.cache.identity import Drawn, Shapes, VaeIdentity
from shared.errors import UserError
from shared.machine.device import set_threads
from shared.models.family import SCHEDULER_CONFIG, Model, load_config
from shared.networks.denoiser import Denoiser, load_schedule, load_unet
from shared.networks.precision import autocast, hold_frozen
from shared.networks.sampling import (
    Predict,
    Watch,
    draw_latents,
    teacher_predictor,
    teacher_scheduler,
)

# What of a scheduler's configuration decides what it draws, beside the spacing.
DECIDING = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr", "set_alpha_to_one", "steps_offset", "clip_sample",
    "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value",
    "solver_type", "lower_order_final", "euler_at_final", "use_karras_sigmas",
    "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas",
    "final_sigmas_type", "lambda_min_clipped", "variance_type",
)  # fmt: skip


def scheduler_config(source: str) -> dict[str, Any]:
    """A model's scheduler configuration. Raises UserError for a schedule that is not known."""
    load_schedule(source)
    return load_config(source, SCHEDULER_CONFIG)


def schedule_hash(sampler: str, config: Mapping[str, Any]) -> str:
    """16 hex digits of what the configuration decides."""
    resolved = teacher_scheduler(sampler, SPACING, config).config
    decided = {name: resolved[name] for name in DECIDING if name in resolved}
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


def refuse_steps(steps: int, config: Mapping[str, Any]) -> None:
    """Raise UserError for more steps than the model has timesteps."""
    most = int(config.get("num_train_timesteps", 1000))
    if steps > most:
        raise UserError(f"--steps {steps} must be 1 to {most}, all that the model knows")


@dataclass(frozen=True)
class Drawing:
    """Latents of a few samples, unscaled, and which of them were drawn a second time."""

    latents: NDArray[np.float16]  # `[n, C, h, w]`
    retried: NDArray[np.bool_]  # `[n]`: in float32, for those that were not finite
    answers: NDArray[np.float16] | None = None  # `[n, K, 3, C, h, w]`


@dataclass(frozen=True)
class Canvas:
    """What is drawn on: latents of this shape, for pictures of `resolution` pixels each way."""

    resolution: int
    vae: VaeIdentity

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        side = self.resolution // self.vae.downscale
        return self.vae.channels, side, side


class Teacher:
    """A model's UNet and its solver."""

    def __init__(
        self, source: str, canvas: Canvas, drawn: Drawn, empty: TextEmbeds, device: torch.device,
        unet: Denoiser | None = None,
    ) -> None:  # fmt: skip
        self.source, self.canvas, self.drawn, self.device = source, canvas, drawn, device
        self.empty = empty.to(device)
        self.config = scheduler_config(source)
        unet = load_unet(source) if unet is None else unet
        hold_frozen(unet, drawn.mixed_precision)  # before it takes the device's memory
        self.unet = unet.to(device)

    @cached_property
    def exact(self) -> Denoiser:
        """The UNet in fp32, for samples that are not finite otherwise."""
        return load_unet(self.source).to(self.device)

    def draw(
        self, texts: TextEmbeds, seeds: Sequence[int], intervals: NDArray[np.int64] | None = None
    ) -> Drawing:
        """Draw up to `batch_size` samples; keep answers at solver `intervals` `[n, K]`, if given.

        What is not finite, or as an answer not in fp16, is drawn once more in fp32, one by one.
        """
        count, most = len(seeds), self.drawn.batch_size
        assert 0 < count <= most
        padded = [*range(count), *[count - 1] * (most - count)]
        kept = self._recorder(intervals)
        z = self._solve(self.unet, texts[padded], [seeds[i] for i in padded], kept)[:count]
        answers = None if kept is None else kept.answers()
        retried = np.zeros(count, dtype=np.bool_)
        if self.drawn.mixed_precision != "no":
            retried = ~z.isfinite().all(dim=(1, 2, 3)).numpy()
            if answers is not None:
                retried |= ~np.isfinite(answers).all(axis=(1, 2, 3, 4, 5))
            for i in retried.nonzero()[0].tolist():
                kept = self._recorder(None if intervals is None else intervals[[i]])
                z[i] = self._solve(self.exact, texts[[i]], [seeds[i]], kept)[0]
                if answers is not None and kept is not None:
                    answers[i] = kept.answers()[0]
        with np.errstate(over="ignore"):
            latents = (z / self.canvas.vae.scaling_factor).numpy().astype(np.float16)
        return Drawing(latents, retried, answers)

    def _recorder(self, intervals: NDArray[np.int64] | None) -> Recorder | None:
        return None if intervals is None else Recorder(intervals, self.drawn.steps)

    def _solve(
        self, unet: Denoiser, texts: TextEmbeds, seeds: Sequence[int], watch: Watch | None
    ) -> Tensor:
        """Scaled latents on the CPU, one per text and seed."""
        precision = "no" if unet is not self.unet else self.drawn.mixed_precision
        predict = self._predictor(unet, texts, precision, watch)
        scheduler = teacher_scheduler(self.drawn.sampler, SPACING, self.config)
        steps, shape = self.drawn.steps, self.canvas.shape
        # A clone, which may be written to: what inference_mode makes may not.
        return draw_latents(predict, scheduler, steps, shape, seeds, self.device).cpu().clone()

    def _predictor(
        self, unet: Denoiser, texts: TextEmbeds, precision: str, watch: Watch | None
    ) -> Predict:
        scale, size = self.drawn.guidance_scale, (self.canvas.resolution,) * 2
        texts = texts.to(self.device)
        plain = teacher_predictor(unet, texts, self.empty, scale, size, watch)

        def predict(z: Tensor, t: Tensor) -> Tensor:
            with autocast(precision, self.device):
                return plain(z, t)

        return predict

    @torch.inference_mode()
    def seconds_per_sample(self) -> float:
        """How long a sample takes, told from one step of a batch."""
        count = self.drawn.batch_size
        texts = self.empty.expand(count)
        predict = self._predictor(self.unet, texts, self.drawn.mixed_precision, None)
        z = torch.zeros((count, *self.canvas.shape), device=self.device)
        t = torch.full((count,), 1, device=self.device)
        for _ in range(2):  # the first one is slow
            start = time.perf_counter()
            predict(z, t).cpu()
        return self.drawn.steps * (time.perf_counter() - start) / count


@dataclass(frozen=True)
class Networks:
    """All that draws."""

    text: TextEncoder
    teacher: Teacher


def load_text(model: Model, shapes: Shapes, clip_skip: int, device: torch.device) -> TextEncoder:
    """Load the text encoders, with the recorded batch shape and number of threads."""
    set_threads(shapes.threads)
    torch.backends.cudnn.allow_tf32 = False  # torch's default: 10 bits where fp32 has 23
    return TextEncoder(model, device, shapes.text_batch_size, clip_skip)
