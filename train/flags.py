"""Which flags of `train distill` mean something beside which: what would be ignored is refused.

The table is that of docs/flags.md. It counts what was given, on the command line or in a TOML file,
also where the value is the default one: `DistillConfig.typed`.
"""

from __future__ import annotations

from shared.cli.other_tools.flags import dashed
from shared.errors import UsageError
from train.config import DistillConfig, EvaluationFlags, RunConfig
from train.export.hub import check_push
from train.flag_groups import FullStudentFlags, LoraFlags, StyleFlags, names_of
from train.objectives import OBJECTIVES, uses_guidance
from train.objectives.objective import Objective
from train.state.optim import check_schedule

# (flag, value) -> the flags that mean something only with it; besides, each objective has its own.
ONLY_WITH: dict[tuple[str, str], tuple[str, ...]] = {
    ("student", "lora"): names_of(LoraFlags),
    ("student", "full"): names_of(FullStudentFlags),
    ("fake", "lora"): ("fake_lora_rank",),
    ("loss_type", "huber"): ("huber_c",),
    ("lr_scheduler", "cosine_with_restarts"): ("lr_num_cycles",),
    ("lr_scheduler", "polynomial"): ("lr_power",),
}
# (flag, value) -> the flags that mean nothing beside it.
NOT_WITH: dict[tuple[str, object], tuple[str, ...]] = {
    ("validation_steps", 0): ("validation_prompts",),
    ("evaluation_steps", 0): tuple(
        name for name in names_of(EvaluationFlags) if name != "evaluation_steps"
    ),
    ("report_to", ("none",)): ("logging_dir", "tracker_project_name"),
}


def check_flags(config: RunConfig) -> None:
    """Raise UserError for flags that do not go together, and numbers that cannot work."""
    for why in ignored(config).values():
        raise UsageError(why)
    if {"num_train_epochs", "max_train_steps"} <= config.typed:
        raise UsageError("--num-train-epochs and --max-train-steps exclude each other; give one")
    check_push(config, config.run)
    check_schedule(config)


def ignored(config: DistillConfig) -> dict[str, str]:
    """The flags that were given and that others make meaningless, each with what is wrong."""
    found = {}
    rules: list[tuple[str, list[str], tuple[str, ...]]] = [
        ("objective", takers, (name,)) for name, takers in objective_flags().items()
    ]
    rules += [(flag, [value], names) for (flag, value), names in ONLY_WITH.items()]
    for flag, values, names in rules:
        actual = getattr(config, flag)
        for name in names if actual not in values else ():
            found[name] = (
                f"{dashed(name)} is for {dashed(flag)} {' or '.join(values)} and means nothing to "
                f"{dashed(flag)} {actual}; leave it out"
            )
    for (flag, nothing), names in NOT_WITH.items():
        for name in names if getattr(config, flag) == nothing else ():
            shown = " ".join(nothing) if isinstance(nothing, tuple) else nothing
            found[name] = (
                f"{dashed(name)} means nothing beside {dashed(flag)} {shown}; leave it out"
            )
    for name in () if uses_guidance(config) else ("w_min", "w_max"):
        told = f"{dashed(name)} is told to a --student full; beside --objective {config.objective}"
        found.setdefault(
            name, f"{told} a LoRA keeps the guidance that it has learned: leave it out"
        )
    return {name: why for name, why in found.items() if name in config.typed}


def objective_flags() -> dict[str, list[str]]:
    """The flags that not every objective takes, each with those that do."""
    takers: dict[str, list[str]] = {}
    for name, objective in OBJECTIVES.items():
        for flag in flags_of(objective):
            takers.setdefault(flag, []).append(name)
    return takers


def flags_of(objective: Objective) -> tuple[str, ...]:
    """The flags that mean something to an objective and not to all: its own, its teacher's."""
    return (*objective.flags, *(names_of(StyleFlags) if objective.needs_teacher else ()))
