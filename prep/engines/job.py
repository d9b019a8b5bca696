"""What an engine knows of its work, and the engine that needs nothing but this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from shared.cache.paths import CachePaths
from shared.cli.progress import Progress
from shared.errors import UserError
from shared.sanitize import on_one_line
from shared.wording import counted

Tick = Callable[[int, int], None]  # so many rows more are done, and so many in all are left out


class Unit(Protocol):
    """What is done as a whole; doing it twice gives the same files."""

    @property
    def name(self) -> str:
        """It is unique in the cache."""

    @property
    def source(self) -> str:
        """It is how messages call it."""


class Work(Protocol):
    """What was done, in numbers that add up; `str` of it is said at the end."""

    def __add__(self, other: Any) -> Any:
        """Both together."""


W = TypeVar("W", bound=Work)


@dataclass(frozen=True)
class Outcome:
    """How a unit ended: committed, or left out for its damaged source."""

    rows: int
    work: Any
    damage: str = ""


class Job(Protocol):
    """All that a worker needs to know to do any unit; it can be sent to another machine."""

    @property
    def cache(self) -> CachePaths:
        """Where the units are committed."""

    @property
    def device(self) -> str:
        """The kind of device that its networks run on: cpu or cuda."""

    def load(self) -> Any:
        """Its networks, on such a device."""

    def do(self, unit: Any, networks: Any, tick: Tick) -> Outcome:
        """Do and commit a unit."""


def run_here(
    job: Job, units: Iterable[Unit], networks: Any, progress: Progress, left_out: str
) -> Iterator[Outcome]:
    """Do one unit after the other in this process: the local engine.

    `left_out` says of what the second number of `tick` counts, such as "rejected in this unit".
    """

    def tick(rows: int, count: int) -> None:
        progress.update(rows, f"{count} {left_out}")

    for unit in units:
        yield job.do(unit, networks, tick)


def add_up(outcomes: Iterable[Outcome], units: int, progress: Progress, work: W) -> W:
    """See the units to their end; a damaged source costs its unit, the others are done first.

    Returns `work`, which is nothing done, and all that the outcomes add. Raises UserError at the
    end where sources were damaged.
    """
    damages = []
    for outcome in outcomes:
        work = work + outcome.work
        if outcome.damage:
            damages.append(outcome.damage)
            progress.write(f"skipped: {on_one_line(outcome.damage)}")
    if damages:
        more = f" (and {len(damages) - 1} more, listed above)" if len(damages) > 1 else ""
        others = units - len(damages)
        rest = f"the other {counted(others, 'unit')} {'is' if others == 1 else 'are'}"
        raise UserError(f"{damages[0]}{more}; {rest} committed")
    return work
