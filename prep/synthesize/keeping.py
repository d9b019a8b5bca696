"""Outputs of the solver's own steps, kept as answers of the teacher: which ones, and in what form.

The solver asks the teacher for both outputs in each of its steps anyway, at its own z_t. A student
that is distilled from the samples is asked about the same samples at such points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.cache.answers import FORMAT, AnswersIdentity, answers_layout, embedding_hash
from shared.cache.conditioning import TextEmbeds
from shared.cache.draws import answer_intervals
from shared.cache.identity import Drawn, Shapes
from shared.cache.layout import Layout
from shared.diffusion import nearest_divisor, schedule_settings
from shared.errors import UserError
from shared.networks.sampling import teacher_scheduler

SPACING = "trailing"


@dataclass(frozen=True)
class Keeping:
    """How answers are kept: what they have in common, and the layout of K of them."""

    identity: AnswersIdentity
    layout: Layout

    @property
    def answers(self) -> int:
        """K."""
        return self.layout.fields[0].shape[0]

    def intervals(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Choose solver intervals `[n, K]` for samples with these keys, of each K different ones.

        Interval 0 is that of the last step.
        """
        steps, seed = self.identity.num_ddim_timesteps, self.identity.seed
        chosen = [answer_intervals(seed, key, steps)[: self.answers] for key in keys]
        return np.asarray(chosen, dtype=np.int64)


def choose_keeping(
    drawn: Drawn, signs: str, source: str, config: Mapping[str, Any], empty: TextEmbeds,
    shapes: Shapes, canvas: tuple[int, int, int],
) -> Keeping | None:  # fmt: skip
    """Say how answers of a model's UNet with these `signs` are kept; None where none are.

    `config` is that of its scheduler, `canvas` the latents' (C, h, w).
    """
    if not drawn.answers:
        return None
    schedule = schedule_settings(config)
    identity = AnswersIdentity(
        FORMAT, source, signs, schedule, drawn.steps, drawn.seed, drawn.mixed_precision, "<f2",
        embedding_hash(empty), drawn.batch_size, shapes.device, shapes.threads, trajectory=True,
    )  # fmt: skip
    channels, *size = canvas
    layout = answers_layout(drawn.answers, channels, (size[0], size[1]), trajectory=True)
    return Keeping(identity, layout)


def refuse_answers(
    answers: int, steps: int, sampler: str, guidance_scale: float, config: Mapping[str, Any]
) -> None:
    """Raise UserError where a solver's steps give no answers, or not so many.

    `config` is that of the model's scheduler. Training draws timesteps from a grid,
    (i + 1) T / N - 1: the solver's must be these.
    """
    total = schedule_settings(config)["num_train_timesteps"]
    if answers > steps:
        raise UserError(
            f"--answers {answers}: each step of the solver gives one, and there are {steps}; "
            "give fewer answers or more --steps"
        )
    if guidance_scale == 1.0:
        raise UserError(
            "--answers needs the output without a caption, which --guidance-scale 1 does not "
            "compute; give another, or leave out --answers"
        )
    if total % steps:
        raise UserError(
            f"--steps {steps} must divide {total}, the timesteps of the teacher, for --answers; "
            f"the nearest that does is {nearest_divisor(steps, total)}"
        )
    scheduler = teacher_scheduler(sampler, SPACING, config)
    scheduler.set_timesteps(steps)
    if scheduler.timesteps.tolist() != list(range(total - 1, -1, -(total // steps))):
        raise UserError(
            f"--answers: {sampler} with this model's scheduler_config.json takes its steps "
            "at other timesteps than training does; leave out --answers"
        )


class Recorder:
    """Keeps what the solver's steps compute of each sample at its intervals `[n, K]`.

    It is shown every step of a batch, of which the first n samples count, the noisiest first. What
    it keeps stays on the device until `answers` asks for it.
    """

    def __init__(self, intervals: NDArray[np.int64], steps: int) -> None:
        self.intervals, self.next = intervals, steps - 1
        self.kept: Tensor | None = None

    def __call__(self, z: Tensor, t: Tensor, cond: Tensor, uncond: Tensor | None) -> None:
        """Take the outputs `[B, C, h, w]` of a step at z."""
        assert uncond is not None
        if self.kept is None:
            shape = (*self.intervals.shape, 3, *z.shape[1:])
            self.kept = torch.zeros(shape, dtype=torch.float16, device=z.device)
        rows, places = map(torch.from_numpy, np.nonzero(self.intervals == self.next))
        if len(rows):
            point = torch.stack([cond[rows], uncond[rows], z[rows]], dim=1)
            self.kept[rows, places] = point.half()  # beyond fp16 it becomes infinite
        self.next -= 1

    def answers(self) -> NDArray[np.float16]:
        """Hand out `[n, K, 3, C, h, w]` after the last step: conditional, unconditional, z_t."""
        assert self.kept is not None
        assert self.next == -1
        values: NDArray[np.float16] = self.kept.cpu().numpy()
        return values
