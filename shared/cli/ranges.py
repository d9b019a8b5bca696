"""What numbers the flags take: the range of each stands in its type, for the parser and --help.

`train_batch_size: Count = 8` is all that a dataclass of flags says of it.
"""

from __future__ import annotations

import math
import typing
from typing import Annotated, Any, Literal, TypeVar

import tyro

from shared.errors import UsageError

T = TypeVar("T")


class Numbers(tyro.constructors.PrimitiveConstructorSpec[Any]):
    """The finite numbers from `low` to `high`; with `above` or `below`, without that end.

    In an annotation it tells tyro how the flag is read and shown: `INT>=1`, `0<=FLOAT<1`.
    """

    low: float
    high: float
    above: bool
    below: bool

    def __init__(
        self,
        kind: type[int] | type[float],
        low: float,
        high: float = math.inf,
        *,
        above: bool = False,
        below: bool = False,
    ) -> None:
        name = kind.__name__.upper()
        shown = f"{name}{'>' if above else '>='}{low}"
        if high != math.inf:
            shown = f"{low}{'<' if above else '<='}{name}{'<' if below else '<='}{high}"
        super().__init__(
            nargs=1,
            metavar=shown,
            instance_from_str=lambda words: kind(words[0]),
            is_instance=lambda value: isinstance(value, int | kind) and not isinstance(value, bool),
            str_from_instance=lambda value: [str(value)],
        )
        vars(self).update(low=low, high=high, above=above, below=below)  # tyro's class is frozen

    def __contains__(self, value: float) -> bool:
        high_enough = value > self.low if self.above else value >= self.low
        low_enough = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and high_enough and low_enough

    def __repr__(self) -> str:  # which tyro puts into its message for "ten"
        return self.metavar

    def words(self) -> str:
        """Return it as people say it: `at least 1`."""
        if self.high == math.inf:
            return f"{'above' if self.above else 'at least'} {self.low}"
        first = "above" if self.above else "from"
        return f"{first} {self.low} to {'below ' if self.below else ''}{self.high}"


Count = Annotated[int, Numbers(int, 1)]
Natural = Annotated[int, Numbers(int, 0)]  # of steps between two events: 0 for never
Seed = Annotated[int, Numbers(int, 0, 2**63 - 1)]  # what torch and NumPy take
Positive = Annotated[float, Numbers(float, 0, above=True)]
NotNegative = Annotated[float, Numbers(float, 0)]
Fraction = Annotated[float, Numbers(float, 0, 1)]
BelowOne = Annotated[float, Numbers(float, 0, 1, below=True)]


def check_numbers(config: Any) -> None:
    """Raise UsageError for the first number of a dataclass of flags that is out of its range."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value, numbers = getattr(config, name), annotation(hint, Numbers)
        if numbers is None or value is None:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if one not in numbers:
                flag, shown = name.replace("_", "-"), one if isinstance(one, int) else f"{one:g}"
                raise UsageError(f"--{flag} {shown} must be {numbers.words()}")


def annotation(hint: Any, kind: type[T]) -> T | None:
    """Return what of a `kind` a type is annotated with, also as one of `Count | None`."""
    inner = [getattr(one, "__metadata__", ()) for one in (hint, *typing.get_args(hint))]
    return next((one for extras in inner for one in extras if isinstance(one, kind)), None)


Precision = Literal["no", "bf16", "fp16"]  # --mixed-precision
