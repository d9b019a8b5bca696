"""How a student or a model is drawn: its scheduler, its steps, and what guidance means to it."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import diffusers
from diffusers import LCMScheduler, SchedulerMixin, TCDScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers

from shared.errors import UserError
from shared.models.family import SCHEDULER_CONFIG, Family, Model, load_config
from train.config import RunConfig
from train.objectives import guidance_learned, guidance_range, objective_of

USUAL_STEPS, FEW_STEPS = 50, 4  # of a model, of a distilled student


class Guidance(enum.Enum):
    """What guidance is to a denoiser."""

    LEARNED = "built in"  # the weights have it: drawn at 1, one pass a step
    TOLD = "told"  # an input of the UNet: any scale, one pass a step
    CLASSIFIER_FREE = "classifier-free"  # a second pass a step, with the negative prompt


@dataclass(frozen=True)
class Sampling:
    """How it is drawn unless told otherwise."""

    scheduler: Any  # diffusers'
    steps: int
    most_steps: int
    guidance: Guidance
    guidance_scale: float  # diffusers' meaning, w + 1
    known_guidance: tuple[float, float] | None = None  # of a student that is told it: the ends

    @property
    def distilled(self) -> bool:
        """Does it draw in few steps?"""
        return self.guidance is not Guidance.CLASSIFIER_FREE


def sampling_of_run(config: RunConfig, model: Model) -> Sampling:
    """How the student of a run is drawn whose teacher is `model`: as `train sample` does."""
    sampler = objective_of(config).sampler
    scheduler = sampler.build(load_config(model.source, SCHEDULER_CONFIG), config)
    guidance, known = Guidance.TOLD, None
    if sampler.classifier_free:
        guidance = Guidance.CLASSIFIER_FREE
    elif guidance_learned(config):
        guidance = Guidance.LEARNED
    most = sampler.most_steps(config) if sampler.most_steps else timesteps_of(scheduler)
    scale = 1.0 if guidance is Guidance.LEARNED else model.family.guidance_scale
    if guidance is Guidance.TOLD:
        low, high = guidance_range(config, model.family)
        known = low + 1, high + 1
    return Sampling(scheduler, sampler.usual_steps(config), most, guidance, scale, known)


def sampling_of(source: str, scheduler: Mapping[str, Any], told: bool, family: Family) -> Sampling:
    """How a model or an export is drawn, by its scheduler's configuration.

    `told` is whether its UNet is told the guidance. LCM's and TCD's schedulers are those of
    distilled students. Raises UserError for an unknown scheduler.
    """
    name = str(scheduler.get("_class_name"))
    kind = schedulers().get(name)
    if kind is None:
        raise UserError(
            f"{source}: diffusers has no scheduler {name!r}, which its scheduler_config.json names"
        )
    guidance = Guidance.TOLD if told else Guidance.CLASSIFIER_FREE
    return with_scheduler(kind.from_config(scheduler), guidance, family.guidance_scale)


def with_scheduler(built: Any, guidance: Guidance, guidance_scale: float) -> Sampling:
    """How a denoiser is drawn by a scheduler: by LCM's and TCD's as a distilled student is."""
    few = isinstance(built, LCMScheduler | TCDScheduler)
    if few and guidance is Guidance.CLASSIFIER_FREE:
        guidance, guidance_scale = Guidance.LEARNED, 1.0
    most = timesteps_of(built)
    if isinstance(built, LCMScheduler):
        most = int(built.config.original_inference_steps)
    steps = min(FEW_STEPS if few else USUAL_STEPS, most)
    return Sampling(built, steps, most, guidance, guidance_scale)


def rescheduled(sampling: Sampling, name: str | None) -> Sampling:
    """The same with the scheduler that `--scheduler` names, if it names one.

    A student keeps its usual steps. Raises UserError for one that diffusers does not have.
    """
    if name is None:
        return sampling
    drawing = (*KarrasDiffusionSchedulers.__members__, "LCMScheduler", "TCDScheduler")
    there = schedulers()  # one whose package is missing is none
    plain = {plain_name(one): one for one in drawing if one in there}
    typed = plain_name(name)
    meant = [typed] if typed in plain else [one for one in plain if one.startswith(typed)]
    if len(meant) != 1:
        raise UserError(
            f"--scheduler {name} is none that draws Stable Diffusion; there are "
            f"{', '.join(meant or plain)}"
        )
    built = there[plain[meant[0]]].from_config(sampling.scheduler.config)
    new = with_scheduler(built, sampling.guidance, sampling.guidance_scale)
    known = sampling.known_guidance
    return replace(new, steps=min(sampling.steps, new.steps), known_guidance=known)


def plain_name(name: str) -> str:
    """Write EulerAncestralDiscreteScheduler as people type it, `euler-ancestral`, and less."""
    return re.sub(r"[-_ ]|scheduler$|discrete", "", name.lower())


@cache
def schedulers() -> dict[str, Any]:
    """Diffusers' schedulers by the names of their classes."""
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    kinds = {name: getattr(diffusers, name) for name in names}
    return {n: k for n, k in kinds.items() if inspect.isclass(k) and issubclass(k, SchedulerMixin)}


def timesteps_of(scheduler: Any) -> int:
    """T: in how many steps the noise is made."""
    return int(scheduler.config.num_train_timesteps)
