"""From flags to units that are done: which of them, and on which engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from prep.engines.job import Job, W, add_up, run_here
from shared.cli.progress import Progress
from shared.errors import UserError

T = TypeVar("T")


class EngineFlags(Protocol):
    """The flags about it."""

    @property
    def engine(self) -> str:
        """It is local or ray."""

    @property
    def ray_address(self) -> str | None:
        """Where the cluster is."""

    @property
    def cpus_per_worker(self) -> int | None:
        """How many cores a worker gets where there are no GPUs."""


def run_units(
    config: EngineFlags, job: Job, units: Sequence[Any], networks: Any, threads: int | None,
    progress: Progress, left_out: str, work: W,
) -> W:  # fmt: skip
    """Do the units on the engine that the flags ask for; returns `work` and what was done.

    `threads` are those of a worker, `left_out` what `run_here` says of them.
    """
    if config.engine == "ray":
        from prep.engines.ray_cluster import run_with_ray  # an extra that few need

        each = config.cpus_per_worker or threads or 1
        outcomes = run_with_ray(job, units, config.ray_address, each, progress)
    else:
        outcomes = run_here(job, units, networks, progress, left_out)
    return add_up(outcomes, len(units), progress, work)


def part_of(units: Sequence[T], part: str | None) -> list[T]:
    """Take the I-th of N parts of a list. Raises UserError for anything but I/N with I < N."""
    if part is None:
        return list(units)
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--part {part!r} is not I/N, such as 0/4 for the first of four")
    return list(units[int(index) :: int(count)])


def check_engine(config: EngineFlags) -> None:
    """Raise UserError for a flag that would be ignored."""
    if config.ray_address is not None and config.engine != "ray":
        raise UserError("--ray-address is for --engine ray; add that, or leave it out")
