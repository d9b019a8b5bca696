"""Where the networks run."""

from __future__ import annotations

import torch

from shared.errors import UserError
from shared.machine import cpus


def pick_device(name: str) -> torch.device:
    """Choose a device: `auto` is a GPU if there is one; `cuda:1` becomes this thread's own.

    Raises UserError for a device that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name!r} is not one of auto, cpu, cuda, cuda:0 ..., mps")
    if colon and not (kind == "cuda" and index.isdecimal()):
        raise UserError(f"--device {name!r}: only cuda takes a number, such as cuda:1")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use --device cpu or auto")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: no Apple GPU here; use --device cpu or auto")
    if colon and int(index) >= (count := torch.cuda.device_count()):
        raise UserError(f"--device {name}: the last CUDA device here is cuda:{count - 1}")
    device = torch.device(name)
    use_device(device)
    return device


def use_device(device: torch.device) -> None:
    """Make it the current CUDA device of this thread; every thread begins with cuda:0.

    Work told to the current device would take memory there, for a CUDA context at the least.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def set_threads(threads: int | None) -> None:
    """Set the CPU threads of the networks: as many as this process may use (cpus.py) unless told.

    Raises UserError below 1.
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads} must be at least 1")
    torch.set_num_threads(threads or cpus.threads())
