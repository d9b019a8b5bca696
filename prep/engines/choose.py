"""The engine that the flags ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from prep.engines.job import Job, Outcome, Unit, run_here
from shared.cli.progress import Progress
from shared.errors import UserError


class EngineFlags(Protocol):
    """The flags about it, which several commands have."""

    @property
    def engine(self) -> str:
        """Local or ray."""

    @property
    def ray_address(self) -> str | None:
        """Of a running cluster."""

    @property
    def cpus_per_worker(self) -> int | None:
        """CPU cores of a Ray worker without a GPU."""


def refuse_idle_flags(flags: EngineFlags) -> None:
    """Raise UserError for a flag that would be ignored."""
    if flags.ray_address is not None and flags.engine != "ray":
        raise UserError("--ray-address is for --engine ray; add that, or leave it out")


def run_units(
    flags: EngineFlags, job: Job, units: Sequence[Unit], networks: Any, threads: int | None,
    progress: Progress,
) -> Iterator[Outcome]:  # fmt: skip
    """Do the units on that engine. Raises UserError as `Job.do` does, or without a cluster."""
    if flags.engine == "ray":
        from prep.engines.ray_cluster import run_with_ray  # an extra that few need

        each = flags.cpus_per_worker or threads or 1
        return run_with_ray(job, units, flags.ray_address, each, progress)
    return run_here(job, units, networks, progress, "rejected in this unit")
