"""How a student or a model is drawn: its scheduler, its steps, and what guidance means to it."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers import LCMScheduler, SchedulerMixin, TCDScheduler

from shared.errors import UserError
from shared.models.family import Family, Model, load_config
from train.config import RunConfig
from train.objectives import guidance_learned, objective_of

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
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

    @property
    def distilled(self) -> bool:
        """Does it draw in few steps?"""
        return self.guidance is not Guidance.CLASSIFIER_FREE


def sampling_of_run(config: RunConfig, model: Model) -> Sampling:
    """How the student of a run is drawn whose teacher is `model`: as `train sample` does."""
    sampler = objective_of(config).sampler
    scheduler = sampler.build(load_config(model.source, SCHEDULER_CONFIG), config)
    guidance = Guidance.TOLD
    if sampler.classifier_free:
        guidance = Guidance.CLASSIFIER_FREE
    elif guidance_learned(config):
        guidance = Guidance.LEARNED
    most = sampler.most_steps(config) if sampler.most_steps else timesteps_of(scheduler)
    scale = scale_of(guidance, model.family)
    return Sampling(scheduler, sampler.usual_steps(config), most, guidance, scale)


def sampling_of(source: str, scheduler: Mapping[str, Any], told: bool, family: Family) -> Sampling:
    """How a model or an export is drawn, by its scheduler's configuration.

    `told` is whether its UNet is told the guidance. LCM's and TCD's schedulers are those of
    distilled students. Raises UserError for an unknown scheduler.
    """
    built = scheduler_class(source, scheduler).from_config(scheduler)
    most = timesteps_of(built)
    if isinstance(built, LCMScheduler):
        most = int(built.config.original_inference_steps)
    few = isinstance(built, LCMScheduler | TCDScheduler)
    guidance = Guidance.LEARNED if few else Guidance.CLASSIFIER_FREE
    if told:
        guidance = Guidance.TOLD
    steps = min(FEW_STEPS if few else USUAL_STEPS, most)
    return Sampling(built, steps, most, guidance, scale_of(guidance, family))


def scheduler_class(source: str, scheduler: Mapping[str, Any]) -> Any:
    """The class that a configuration names. Raises UserError for none that diffusers has."""
    name = str(scheduler.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, SchedulerMixin)):
        raise UserError(
            f"{source}: diffusers has no scheduler {name!r}, which its scheduler_config.json names"
        )
    return kind


def timesteps_of(scheduler: Any) -> int:
    """T: in how many steps the noise is made."""
    return int(scheduler.config.num_train_timesteps)


def scale_of(guidance: Guidance, family: Family) -> float:
    """The guidance_scale unless given."""
    return 1.0 if guidance is Guidance.LEARNED else family.guidance_scale
