"""Results with what they were measured on."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from shared.machine import cpus

RESULTS = Path(__file__).resolve().parents[1] / "results"


def record(name: str, figures: dict[str, Any]) -> Path:
    """Write `results/NAME-HARDWARE.json`: figures, hardware, versions and commit; say where."""
    path = save(name, figures)
    print(path)
    return path


def save(name: str, figures: dict[str, Any]) -> Path:
    """What `record` does, without a word."""
    import torch

    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    result = {
        "hardware": f"{hardware}, {cpus.cpus()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        **figures,
    }
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    path = RESULTS / f"{name}-{kind}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def cpu_name() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit measured, marked where files were changed since."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(describe, capture_output=True, text=True, cwd=RESULTS.parent)
    except FileNotFoundError:  # no git
        return "unknown"
    return answer.stdout.strip() or "unknown"
