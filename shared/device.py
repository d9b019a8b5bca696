"""Where the networks run."""

from __future__ import annotations

import os

import torch

from shared.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises UserError for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use --device cpu or auto")
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name!r} is not one of auto, cpu, cuda, mps")
    return torch.device(name)


def set_threads(threads: int | None) -> None:
    """CPU threads of the networks: all cores unless told. Raises UserError below 1.

    Processes that a launcher has started on one machine divide its cores.
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads} must be at least 1")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max((os.cpu_count() or 1) // processes, 1))
