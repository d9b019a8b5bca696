"""The teacher, asked with the caption and without, in batches of one shape."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prep.teach.questions import Question, text_of
from shared.cache.conditioning import TextEmbeds
from shared.diffusion import Schedule, add_noise, solver_timesteps
from shared.machine.device import set_threads
from shared.models.fingerprint import signs
from shared.networks.denoiser import Denoiser, cond_and_uncond, load_schedule
from shared.networks.precision import autocast, hold_frozen
from shared.networks.styled import load_teacher
from shared.style import Style


@dataclass(frozen=True)
class Answer:
    """Conditional and unconditional output `[2, C, h, w]` at one question."""

    outputs: NDArray[np.float32]
    retried: bool = False  # in fp32


class Teacher:
    """A frozen UNet on a device, and what it is asked with.

    A batch always has `batch_size` questions, the last one is filled up: with one shape, an answer
    does not depend on its neighbours. `asked` counts the questions, without the filling.
    """

    def __init__(
        self, source: str, device: torch.device, batch_size: int, mixed_precision: str,
        num_ddim_timesteps: int, threads: int | None, styles: Sequence[Style] = (),
    ) -> None:  # fmt: skip
        set_threads(threads)
        torch.backends.cudnn.allow_tf32 = False  # torch's default: 10 bits where fp32 has 23
        self.source, self.device, self.batch_size = source, device, batch_size
        self.mixed_precision = mixed_precision
        self.num_ddim_timesteps = num_ddim_timesteps
        self.styles = styles
        unet = load_teacher(source, styles)
        self.signs = signs(unet.parameters())
        hold_frozen(unet, mixed_precision)
        self.unet: Denoiser = unet.to(device)
        self.schedule: Schedule = load_schedule(source).to(device)
        self.asked = 0

    def ask(self, questions: Sequence[Question], empty: TextEmbeds) -> list[Answer]:
        """Return what the teacher says to as many questions as are a batch, or fewer.

        What is not finite, or beyond fp16, has been asked for again in fp32; it may still be so.
        `empty` is the unconditional embedding, one row.
        """
        self.asked += len(questions)
        outputs = self._forward(self.unet, self.mixed_precision, questions, empty)
        found = [Answer(output) for output in outputs]
        if self.mixed_precision != "no":
            for n, answer in enumerate(found):
                if not fits_fp16(answer.outputs):
                    exact = self._forward(self._exact, "no", [questions[n]], empty)
                    found[n] = Answer(exact[0], retried=True)
        return found

    def seconds(self, questions: Sequence[Question], empty: TextEmbeds) -> float:
        """Measure a batch, after one that warms up."""
        self._forward(self.unet, self.mixed_precision, questions, empty)
        start = time.perf_counter()
        self._forward(self.unet, self.mixed_precision, questions, empty)
        return time.perf_counter() - start

    @cached_property
    def _exact(self) -> Denoiser:
        """The teacher in fp32, loaded where it is needed."""
        return load_teacher(self.source, self.styles).to(self.device)

    @torch.inference_mode()
    def _forward(
        self, unet: Denoiser, mixed_precision: str, questions: Sequence[Question], empty: TextEmbeds
    ) -> NDArray[np.float32]:
        filled = [*questions, *[questions[-1]] * (self.batch_size - len(questions))]
        index = torch.tensor([question.index for question in filled], device=self.device)
        t, _ = solver_timesteps(index, self.num_ddim_timesteps, self.schedule.num_train_timesteps)
        latents, noise = (self._stack([getattr(q, name) for q in filled])
                          for name in ("latents", "noise"))  # fmt: skip
        z = add_noise(latents, noise, *self.schedule.alpha_sigma(t))
        text, unconditional = text_of(filled).to(self.device), empty.to(self.device)
        each = [question.time_ids for question in filled if question.time_ids is not None]
        time_ids = self._stack(each) if each else None
        with autocast(mixed_precision, self.device):
            both = cond_and_uncond(unet, z, t, text, unconditional, time_ids)
        answers = torch.stack(both, dim=1)[: len(questions)]
        return answers.float().cpu().numpy()

    def _stack(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts)).to(self.device)


def fits_fp16(values: NDArray[np.float32]) -> bool:
    """Are all values finite, also as fp16?"""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(np.float16)).all())
