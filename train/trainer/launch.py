"""How a launcher told this process of the others: torchrun's variables, or what stands for them.

accelerate knows torchrun's, and on CPUs some of MPI's. A process that none of them reaches would
train alone, beside as many others that do the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping

from shared.errors import UserError

# Rank and number of processes, then the same among those of one machine.
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OTHERS = {
    "mpirun": (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpirun (MVAPICH)": (
        "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "mpirun (MPICH)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK",
              "JSM_NAMESPACE_LOCAL_SIZE"),
    "horovodrun": ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    "flux run": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
}  # fmt: skip
TORCHRUN = "`torchrun --nproc-per-node N -m train -- distill ...`"
MEETING_PORT = 29500  # torchrun's and accelerate's


def join(environment: MutableMapping[str, str] = os.environ) -> int:
    """The number of processes; torchrun's variables are set where another launcher has its own.

    Raises UserError where several were asked for or started that could not find each other.
    """
    if number(environment, "WORLD_SIZE") > 1 or "LOCAL_RANK" in environment:
        if missing := [name for name in TORCH[:3] if name not in environment]:
            raise UserError(
                f"WORLD_SIZE and LOCAL_RANK are a launcher's, but {', '.join(missing)} is not set; "
                f"start the processes with {TORCHRUN}, or unset them"
            )
        return number(environment, "WORLD_SIZE")
    for launcher, names in OTHERS.items():
        size = started(environment, names)
        if size > 1:
            adopt(environment, launcher, names, size)
            return size
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        # accelerate's launcher of one process, which names a meeting point where more were asked.
        raise UserError(
            "accelerate was asked for several processes and has started one, as it does without "
            f"--multi_gpu; start them with {TORCHRUN}, or leave out --num_processes"
        )
    return 1


def number(environment: Mapping[str, str], name: str) -> int:
    """The first number in a variable (Slurm writes `2(x3)`); 1 where it says nothing."""
    found = re.match(r"\d+", environment.get(name, ""))
    return int(found.group()) if found else 1


def started(environment: Mapping[str, str], names: tuple[str, ...]) -> int:
    """How many processes a launcher says it has started.

    Slurm tells a batch script, which is one process, of its tasks, too: those of a step count, and
    without it a rank that only a step has.
    """
    rank, size, *_ = names
    if rank == "SLURM_PROCID" and size not in environment and environment.get(rank, "0") != "0":
        return number(environment, "SLURM_NTASKS")
    return number(environment, size)


def adopt(
    environment: MutableMapping[str, str], launcher: str, names: tuple[str, ...], size: int
) -> None:
    """Set torchrun's variables to what another launcher says.

    Raises UserError where something is missing that they need.
    """
    rank, _, local_rank, local_size = names
    if rank not in environment or local_rank not in environment:
        raise UserError(
            f"{launcher} has started {size} processes that cannot find each other; let it start "
            f"one on each machine, which starts the others with {TORCHRUN}"
        )
    here = min(number(environment, local_size) if local_size in environment else size, size)
    if here < size and "MASTER_ADDR" not in environment:
        raise UserError(
            f"{launcher} has started {size} processes, {here} of them here; export MASTER_ADDR, "
            f"the name of the machine of the first, or use {TORCHRUN}"
        )
    job = number(environment, "SLURM_JOB_ID") if "SLURM_JOB_ID" in environment else None
    port = MEETING_PORT if job is None else 15000 + job % 10000  # jobs may share a machine
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", str(port))
    values = (environment[rank], str(size), environment[local_rank], str(here))
    environment.update(zip(TORCH, values, strict=True))
