"""Distribution matching distillation (DMD2, arXiv 2405.14867).

The student draws; its picture x moves to where the teacher finds pictures more likely than the fake
score does, which knows what the student draws by now. So x needs no picture to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import LCMScheduler
from torch import Tensor
from torch.nn.functional import softplus

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import (
    Schedule,
    add_noise,
    diffusion_target,
    expand,
    guided,
    predicted_x0,
)
from shared.errors import UserError
from shared.wording import counted
from train.config import DistillConfig
from train.data.batch import Batch
from train.flag_groups import DistributionFlags, names_of
from train.objectives.formulas import consistency_function
from train.objectives.objective import Card, Loss, Objective, Partner, Sampler

TAU = (0.02, 0.98)  # of the timesteps: where pictures are judged, as published
CRITIC = 2.0  # its part of the GAN term, against the student's: 1e-2 to 5e-3 as published
GAN_SCALE = 2.0**10  # keeps the slopes of the GAN term above fp16's smallest numbers


class Networks(Protocol):
    """The networks of distribution matching; outputs are eps or v as the teacher predicts, fp32."""

    def student(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """With gradients."""

    def target(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The student without gradients."""

    def teacher(
        self, z: Tensor, t: Tensor, batch: Batch, empty: TextEmbeds
    ) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional prediction, without gradients."""

    def fake(self, z: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Its prediction without gradients; with a GAN term its head's logits `[B]` of z."""

    def learning_fake(
        self, z: Tensor, t: Tensor, batch: Batch, *real: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Both with gradients for the fake score; the logits of `real` follow those of z."""


@dataclass(frozen=True)
class DMD(Loss):
    """Both losses with their settings. `schedule` lies on the batch's device, in fp32."""

    schedule: Schedule
    num_student_steps: int  # N
    timestep_scaling: float
    gan_weight: float

    @property
    def intervals(self) -> int:
        """`batch.index` is which of its N steps the student is trained at."""
        return self.num_student_steps

    @property
    def uniforms(self) -> int:
        """For tau: the student's, and the fake score's."""
        return 2

    @property
    def noises(self) -> int:
        """Between N steps, and at tau: the student's, and the fake score's."""
        return self.num_student_steps + 1

    def __call__(self, batch: Batch, empty: TextEmbeds, networks: Networks) -> Tensor:
        """The student's loss of a batch, a scalar; `empty` is the unconditional embedding, one row.

        The picture is drawn once to be judged and once more with gradients, so that the activations
        of one network at a time are kept.
        """
        z, t = self.simulate(batch, networks)
        drawn = self.f(networks.target(z, t, batch), z, t)
        gradient, gan, slope = self.judge(drawn, batch, empty, networks)
        x = self.f(networks.student(z, t, batch), z, t)
        loss = 0.5 * ((x - (x - gradient).detach()) ** 2).mean()
        if gan is None or slope is None:
            return loss
        return loss + self.gan_weight * (gan + (slope * (x - x.detach())).sum())

    def fake_loss(self, batch: Batch, empty: TextEmbeds, networks: Networks) -> Tensor:
        """The fake score's loss of what the student draws: the diffusion loss, and the GAN's."""
        z, t = self.simulate(batch, networks)
        x = self.f(networks.target(z, t, batch), z, t)
        uniforms, noises = more_of(batch)
        noise, tau = noises[:, -1], self.timestep(uniforms[:, 1], 0.0, 1.0)
        at = self.schedule.alpha_sigma(tau)
        real = [add_noise(batch.latents, noise, *at)] if self.gan_weight else []
        output, logits = networks.learning_fake(add_noise(x, noise, *at), tau, batch, *real)
        wanted = diffusion_target(x, noise, *at, self.schedule.prediction_type)
        loss = ((output - wanted) ** 2).mean()
        if logits is None:
            return loss
        generated, real_ones = logits.chunk(2)
        gan = (softplus(generated) + softplus(-real_ones)).mean()
        return loss + CRITIC * self.gan_weight * gan

    @torch.no_grad()
    def simulate(self, batch: Batch, networks: Networks) -> tuple[Tensor, Tensor]:
        """Where the step that is trained begins, z and t, as the student itself comes there.

        All steps are taken for all samples, and each keeps those before its own: no number has to
        be read from the device, and all processes take as many forwards.
        """
        z, times, (_, noises) = batch.noise, self.timesteps, more_of(batch)
        for step, after in enumerate(times[1:]):
            t = times[step].expand(len(z))
            x = self.f(networks.target(z, t, batch), z, t)
            onward = add_noise(x, noises[:, step], *self.schedule.alpha_sigma(after[None]))
            z = torch.where(expand(batch.index > step, z), onward, z)
        return z, times[batch.index]

    @property
    def timesteps(self) -> Tensor:
        """The student's steps `[N]`, the first one first: LCMScheduler's of N original steps."""
        n, total = self.num_student_steps, self.schedule.num_train_timesteps
        device = self.schedule.alphas_cumprod.device
        return torch.arange(n, 0, -1, device=device) * (total // n) - 1

    def f(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """What LCMScheduler makes of the student's output at (z, t)."""
        return consistency_function(output, z, t, self.schedule, self.timestep_scaling)

    def timestep(self, uniform: Tensor, low: float, high: float) -> Tensor:
        """Timesteps `[B]` from numbers in [0, 1), uniform between these parts of T."""
        total = self.schedule.num_train_timesteps
        first, last = int(low * total), min(int(high * total), total - 1)
        return (first + (uniform * (last - first + 1)).long()).clamp(max=last)

    @torch.no_grad()
    def judge(
        self, x: Tensor, batch: Batch, empty: TextEmbeds, networks: Networks
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradient at x, the GAN term and its slope at x; None, None without such a term.

        DMD's gradient (arXiv 2311.18828, eq. 7), weighted as in DMD2's code: per sample
        (x0_fake - x0_real) / mean |x - x0_real|, both read off x noised to tau.
        """
        uniforms, noises = more_of(batch)
        noise, tau = noises[:, -2], self.timestep(uniforms[:, 0], *TAU)
        at = self.schedule.alpha_sigma(tau)
        gan = slope = None
        with torch.set_grad_enabled(self.gan_weight > 0):
            x = x.detach().requires_grad_(self.gan_weight > 0)
            z = add_noise(x, noise, *at)
            output, logits = networks.fake(z, tau, batch)
            if logits is not None:
                gan = softplus(-logits).mean()
                slope = torch.autograd.grad(gan * GAN_SCALE, x)[0] / GAN_SCALE
                gan = gan.detach()
        x, z, kind = x.detach(), z.detach(), self.schedule.prediction_type
        fake = predicted_x0(output, z, *at, kind)
        cond, uncond = networks.teacher(z, tau, batch, empty)
        real = guided(predicted_x0(cond, z, *at, kind), predicted_x0(uncond, z, *at, kind), batch.w)
        size = (x - real).abs().flatten(1).mean(1)
        return (fake - real) / expand(size, x), gan, slope


def more_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """The numbers and noises that a batch has for this loss."""
    assert batch.uniforms is not None
    assert batch.noises is not None
    return batch.uniforms, batch.noises


def build(config: DistillConfig, schedule: Schedule, grid: int | None = None) -> DMD:
    """The losses that the flags ask for. Raises UserError for steps that cannot be.

    The student's pictures are new ones in every step, so there is no `grid` of a teacher's answers.
    """
    assert grid is None
    total = schedule.num_train_timesteps
    if config.num_student_steps > total:
        raise UserError(
            f"--num-student-steps {config.num_student_steps} must be 1 to {total}, the timesteps "
            "of the teacher"
        )
    first = config.fake_warmup_steps + config.fake_updates
    if config.max_train_steps < first:
        raise UserError(
            f"the student first learns in step {first} (--fake-warmup-steps "
            f"{config.fake_warmup_steps}, --fake-updates {config.fake_updates}), and there are "
            f"{config.max_train_steps}; give more --max-train-steps or less warm-up"
        )
    return DMD(
        schedule=schedule,
        num_student_steps=config.num_student_steps,
        timestep_scaling=config.timestep_scaling_factor,
        gan_weight=config.gan_weight,
    )


def student_due(config: DistillConfig, step: int) -> bool:
    """Does the student learn in optimizer step 1, 2, ...?"""
    done = step - config.fake_warmup_steps
    return done > 0 and done % config.fake_updates == 0


def fake_learning_rate(config: DistillConfig) -> float:
    """The flag, else by the kind of the fake score."""
    return config.fake_learning_rate or {"lora": 4e-4, "full": 1e-5}[config.fake]


def comfy_settings(config: DistillConfig) -> str:
    """How they are drawn in ComfyUI and its like, whose LCM sampling knows 50 timesteps."""
    steps = config.num_student_steps
    text = f"CFG 1, sampler LCM, {counted(steps, 'step')}, in ComfyUI with `simple`"
    if steps > 2:
        text += " (at timesteps that are not quite those of its training, as in diffusers they are)"
    return text


OBJECTIVE = Objective(
    build=build,
    flags=("w_min", "w_max", *names_of(DistributionFlags)),
    learning_rates={"lora": 5e-5, "full": 1e-6},
    needs_teacher=True,
    needs_target=False,
    takes_guidance=False,
    partner=Partner(
        name="fake",
        loss=lambda dmd: dmd.fake_loss,
        learning_rate=fake_learning_rate,
        student_due=student_due,
    ),
    sampler=Sampler(
        scheduler=LCMScheduler,
        options=lambda config: {
            "original_inference_steps": config.num_student_steps,
            "timestep_scaling": config.timestep_scaling_factor,
        },
        classifier_free=False,
        steps=1000,  # all that the student has
        preview_steps=(1, 2, 4, 8),
        most_steps=lambda config: config.num_student_steps,
    ),
    card=Card(
        purpose="that lets {teacher} draw in few steps: [distribution matching distillation]"
        "(https://arxiv.org/abs/2405.14867)",
        settings=("w_min", "w_max", "lora_rank", "lora_alpha", *names_of(DistributionFlags)),
        tags=("distribution-matching",),
        other_programs=comfy_settings,
    ),
)
