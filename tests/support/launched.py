"""Runs on several processes, as a launcher starts them, watched by `tests.support.ranks`."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import warm

LCM = {
    "train_batch_size": 4, "max_train_steps": 2, "checkpointing_steps": 2, "lora_rank": 4,
    "unet_time_cond_proj_dim": 16, "logging_steps": 1, "validation_steps": 0,
    "learning_rate": 1e-3, "max_grad_norm": 1e6, "threads": 1, "report_to": ["none"],
}  # fmt: skip
TWO = {"train_batch_size": 2}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def launcher(repo: Path, folder: Path, model: Path, cache: Path) -> Callable[..., Path]:
    """Run `tests.support.ranks` on so many processes; returns the run's folder."""

    def start(
        name: str, world: int, environment: dict[str, str] | None = None, double: bool = False,
        **flags: Any,
    ) -> Path:  # fmt: skip
        run = folder / name
        (folder / f"{name}-spied").mkdir(exist_ok=True)
        base = {"model": str(model), "cache": str(cache), "run": str(run)}
        given = {k: v for k, v in (base | LCM | flags).items() if v is not None}
        wanted = {"flags": given, "spied": f"{run}-spied", "double": double}
        (folder / "flags.json").write_text(json.dumps(wanted))
        words = ["-m", "tests.support.ranks", folder / "flags.json"]
        told = {"OMP_NUM_THREADS": "1", **(environment or {})}
        ranks = [warm.start(words, repo, **told, **place) for place in as_torchrun_does(world)]
        ended = [(*process.communicate(), process.returncode) for process in ranks]
        assert [status for *_, status in ended] == [0] * world, ended
        assert world == 1 or f"over {world} processes" in ended[0][1]
        return run

    return start


def as_torchrun_does(world: int) -> list[dict[str, str]]:
    """The variables of each process. `torchrun` itself starts some of test_parallel.py."""
    if world == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world,
              "LOCAL_WORLD_SIZE": world}  # fmt: skip
    ranks = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]
