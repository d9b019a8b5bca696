"""The flags of runs side by side: those that differ, and those that are the same in all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from infer.compare.records import Record
from shared.cli.config import to_dict
from train.config import DistillConfig, RunConfig
from train.flags import ignored
from train.trainer.resume import FREE

# Where a run lies and how it was called: what every run has of its own.
OWN = frozenset({"run", "resume_from_checkpoint", "take_over", "dry_run"})
# What people ask for first; what a student does not depend on comes last.
FIRST = (
    "objective", "student", "model", "cache", "teacher", "learning_rate", "train_batch_size",
    "max_train_steps", "init_student",
)  # fmt: skip
FLAGS = frozenset(field.name for field in dataclasses.fields(DistillConfig))
NOTHING = "–"


@dataclass(frozen=True)
class Setting:
    """A flag, and what it says in each run, or in all of them."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """The flags of several runs."""

    differing: tuple[Setting, ...]
    same: tuple[Setting, ...]


def settings_of(records: Sequence[Record]) -> Settings:
    """Divide the flags of runs into those that differ, and the rest."""
    flags = [meant(one.config) for one in records]
    differing, same = [], []
    for name in sorted(set().union(*flags) - OWN, key=rank):
        values = [one.get(name) for one in flags]
        if all(value == values[0] for value in values):
            same.append(Setting(flag(name), (told(values[0]),)))
        else:
            differing.append(Setting(flag(name), tuple(map(told, values))))
    differing.sort(key=lambda one: NOTHING in one.values)  # what some runs do not have comes last
    return Settings(tuple(differing), tuple(same))


def meant(config: RunConfig) -> dict[str, Any]:
    """The flags of a run; those that mean nothing beside the others are None."""
    values = to_dict(config)
    meaningless = ignored(replace(config, typed=frozenset(values)))
    return {name: None if name in meaningless else value for name, value in values.items()}


def rank(name: str) -> tuple[int, str]:
    """What settings are sorted by: those that people ask for, the others, those that are free."""
    if name in FIRST:
        return FIRST.index(name), name
    return len(FIRST) + (name in FREE), name


def flag(name: str) -> str:
    """A setting as it is typed; what is no flag is in words."""
    return f"--{name.replace('_', '-')}" if name in FLAGS else name.replace("_", " ")


def told(value: Any) -> str:
    """A setting's value as people write it."""
    if value is None or value == []:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(told, value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)
