"""How a value of another tool's flag becomes values of ours.

A function here takes the value as it was typed, or as a file of settings has it, and returns our
settings. It raises UsageError, which goes on behind the flag's name, for one that means nothing
here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import UsageError

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Switch:
    """A flag without a value that is a choice of ours."""

    ours: str
    value: Any


@dataclass(frozen=True)
class Reader:
    """A flag whose values are written otherwise here; `ours` is what a command must have."""

    ours: str
    read: Callable[[Any], Settings]


# Our name, which takes the same values, or one of the above.
Taken = str | Switch | Reader


def refusals(table: Mapping[str, str]) -> dict[str, str]:
    """Return what to use instead by flag; a key of the table is one flag, or several."""
    return {name: why for names, why in table.items() for name in names.split()}


def optimizer(value: Any) -> Settings:
    """Read `AdamW8bit` as a switch beside AdamW."""
    kinds = {"adamw": False, "adamw8bit": True}
    if str(value).lower() not in kinds:
        raise UsageError(f"{value!r} is not offered; AdamW and AdamW8bit are (--use-8bit-adam)")
    return {"use_8bit_adam": kinds[str(value).lower()]}


def square(value: Any) -> Settings:
    """Read `512,512` and `[512, 512]` as 512."""
    sides = value if isinstance(value, list) else str(value).replace("x", ",").split(",")
    if len(sides) == 1:
        return {"resolution": value}
    try:
        numbers = [int(side) for side in sides]
    except ValueError:
        raise UsageError(f"{value!r} is not a number of pixels") from None
    if len(set(numbers)) > 1:
        side = round((numbers[0] * numbers[-1]) ** 0.5 / 64) * 64
        raise UsageError(
            f"{value!r} is not square; for pictures of all shapes take --buckets and "
            f"--resolution {side}, a square of about as many pixels"
        )
    return {"resolution": numbers[0]}


def warmup(value: Any) -> Settings:
    """Read a whole number of steps; kohya's fraction of them is refused."""
    try:
        fraction = "." in str(value) and 0 < float(value) < 1
    except ValueError:
        fraction = False
    if fraction:
        raise UsageError(f"{value} is a fraction of the steps; give their number")
    return {"lr_warmup_steps": value}


def network(value: Any) -> Settings:
    """Read kohya's module for a LoRA, the only one that is taken."""
    if value != "networks.lora":
        raise UsageError(f"{value!r} is not offered; networks.lora is, as --student lora")
    return {"student": "lora"}


def prompts(value: Any) -> Settings:
    """Read one prompt as a list of one."""
    return {"validation_prompts": [value] if isinstance(value, str) else value}


def trackers(value: Any) -> Settings:
    """Read one tracker's name, or `all`."""
    both = ["tensorboard", "wandb"]  # which kohya calls all
    names = [value] if isinstance(value, str) else value
    return {"report_to": both if value == "all" else names}


def repository(value: Any) -> Settings:
    """Read a repository as the wish to publish there."""
    return {"push_to_hub": True, "hub_model_id": value}
