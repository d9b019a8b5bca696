"""Losses, each in a file of its own name with all that goes with it."""

from __future__ import annotations

from importlib import import_module
from typing import get_args

from shared.errors import UserError
from shared.models.family import Family
from train.config import DistillConfig
from train.flag_groups import CACHED, ObjectiveName
from train.objectives.objective import Objective

OBJECTIVES: dict[str, Objective] = {
    name: import_module(f"train.objectives.{name}").OBJECTIVE for name in get_args(ObjectiveName)
}


def objective_of(config: DistillConfig) -> Objective:
    """The objective that a run's flags name."""
    return OBJECTIVES[config.objective]


def is_told_guidance(config: DistillConfig) -> bool:
    """Is a run's student told w by an input of its own?"""
    return objective_of(config).takes_guidance and config.student == "full"


def guidance_range(config: DistillConfig, family: Family) -> tuple[float, float]:
    """Where a run's w is drawn from: the flags' ends, else the family's.

    Raises UserError for an empty range.
    """
    low = family.w_min if config.w_min is None else config.w_min
    high = family.w_max if config.w_max is None else config.w_max
    if low > high:
        raise UserError(f"--w-min {low:g} is above --w-max {high:g}")
    return low, high


def uses_guidance(config: DistillConfig) -> bool:
    """Does w mean anything to a run: to the teacher's solver, or to a full student?"""
    return objective_of(config).needs_teacher or is_told_guidance(config)


def guidance_learned(config: DistillConfig) -> bool:
    """Are a run's students drawn without guidance, which the weights have in them?"""
    return not (is_told_guidance(config) or objective_of(config).sampler.classifier_free)


def asks_teacher(config: DistillConfig) -> bool:
    """Does a run compute what the teacher says, rather than read it or do without?"""
    return objective_of(config).needs_teacher and config.teacher != CACHED
