"""How many processors this process may use: asked of the system and its schedulers, here alone.

A machine's number of cores is not it. A job may be pinned to some of them (taskset, Slurm, cpusets
of containers), have a quota of processor time (`docker --cpus`, Kubernetes' limits), be granted
fewer by its scheduler, or be told by OMP_NUM_THREADS. Threads beyond that take turns on the same
cores and wait for each other at the end of every operation: a step becomes many times slower.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

PROC = Path("/proc/self")


def cpus(environment: Mapping[str, str] = os.environ) -> int:
    """Return processors for this process and all it does, at least one.

    The least of affinity, cgroup quota and Slurm's grant, of which each of the processes that a
    launcher has started on this machine takes its part.
    """
    granted = min(_affinity(), _quota(PROC))
    per_task = _number(environment.get("SLURM_CPUS_PER_TASK"))
    if per_task is not None:
        granted = min(granted, per_task)
        if _ranks_are_tasks(environment):  # each has all of its grant for itself
            return granted
    processes = _number(environment.get("LOCAL_WORLD_SIZE")) or 1
    return max(granted // processes, 1)


def threads(environment: Mapping[str, str] = os.environ) -> int:
    """Return threads for this process's networks: its processors, fewer if OMP_NUM_THREADS says so.

    That variable means one process already; torchrun and accelerate set it so.
    """
    named = environment.get("OMP_NUM_THREADS", "").partition(",")[0]  # a number for each level
    return min(cpus(environment), _number(named) or cpus(environment))


def _number(text: str | None) -> int | None:
    """Return a number above zero, or None for anything else."""
    text = (text or "").strip()
    return int(text) if text.isdecimal() and int(text) > 0 else None


def _ranks_are_tasks(environment: Mapping[str, str]) -> bool:
    """Has Slurm started each process of a distributed run as a task of its own?"""
    world, rank = environment.get("WORLD_SIZE"), environment.get("RANK")
    tasks, task = environment.get("SLURM_NTASKS"), environment.get("SLURM_PROCID")
    return world not in (None, "1") and (world, rank) == (tasks, task)


def _affinity() -> int:
    """Return processors that the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # not Linux


def _quota(proc: Path) -> int:
    """Return whole processors' worth of time that cgroups allow, of version 1 or 2."""
    limits = [_limit(folder) for folder in _cgroups(proc)]
    least = min((limit for limit in limits if limit is not None), default=float(1 << 20))
    return max(int(least), 1)


def _limit(folder: Path) -> float | None:
    """Return processors' worth of time that one cgroup allows, or None where it allows all."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # not there, or "max"
        return None


def _cgroups(proc: Path) -> Iterator[Path]:
    """Yield the folders of this process's cgroups and of those around them: each may limit it.

    A container may see its own cgroup as the root of what is mounted, while /proc/self/cgroup
    tells the path outside: then the root is looked at.
    """
    try:
        mine = dict(_memberships((proc / "cgroup").read_text()))
        mounts = list(_mounts((proc / "mountinfo").read_text()))
    except OSError:  # not Linux
        return
    for kind, root, mount in mounts:
        if kind in mine:
            path = PurePosixPath(mine[kind])
            inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
            yield from (mount / part for part in (inside, *inside.parents))


def _memberships(text: str) -> Iterator[tuple[str, str]]:
    """Yield controller ("cpu" of version 1, "" of version 2) and path, of /proc/self/cgroup."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            yield "cpu", path
        elif not controllers:
            yield "", path


def _mounts(text: str) -> Iterator[tuple[str, str, Path]]:
    """Yield controller, root and mount point of each hierarchy, of /proc/self/mountinfo."""
    for line in text.splitlines():
        before, _, kind = line.partition(" - ")
        root, mount = (_unescaped(word) for word in before.split(" ")[3:5])
        name, _, options = kind.split(" ", 2)
        if name == "cgroup2":
            yield "", root, Path(mount)
        elif name == "cgroup" and "cpu" in options.split(","):
            yield "cpu", root, Path(mount)


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)
