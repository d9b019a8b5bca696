"""Commands that write into a run, as a crash disturbs them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.storage.temporary import sweep
from train.config import DistillConfig
from train.state import checkpoint
from train.trainer import loop, setup

ROOT = Path(__file__).resolve().parents[2]
RUN = Path("run")  # relative, since the card and the configuration name it


@dataclass(frozen=True)
class Scenario:
    """What is there before, and the command that is disturbed; both in a folder of their own."""

    run: Callable[[], None]
    begin: Callable[[], None] = lambda: None


def fake(step: int, limit: int | None = None, branch: int = 0) -> None:
    """A checkpoint as the trainer writes it, of tensors that take no time."""
    progressed = checkpoint.TrainingState(step, 4 * step, 4, {"seed": 0}, branch=branch)
    networks = {name: torch.full((3,), float(step)) for name in "ab"}
    checkpoint.save_checkpoint(
        RUN, checkpoint.Checkpoint(progressed, networks, {"a/step": torch.ones(step)}), limit
    )


def save_on(until: int, limit: int) -> None:
    """Go on from the latest checkpoint, saving at every step."""
    sweep(RUN / "tmp")
    latest = checkpoint.find_checkpoint(RUN, "latest")
    done = 0 if latest is None else checkpoint.read_progress(latest).step
    for step in range(done + 1, until + 1):
        fake(step, limit)


def save_again() -> None:
    """Step 3 once more, which an abandoned attempt had reached already."""
    sweep(RUN / "tmp")
    fake(3)


def branch_off() -> None:
    """From step 1 once more to step 2, where an attempt that is now abandoned came to 3."""
    sweep(RUN / "tmp")
    resumed = checkpoint.find_checkpoint(RUN, "latest")
    if checkpoint.read_progress(resumed).branch == 0:
        resumed = checkpoint.checkpoint_folder(RUN, 1)
    branch = checkpoint.start_branch(RUN, resumed)
    assert checkpoint.find_checkpoint(RUN, "latest") == resumed
    for step in range(checkpoint.read_progress(resumed).step + 1, 3):
        fake(step, 2, branch)
    assert checkpoint.find_checkpoint(RUN, "latest") == checkpoint.checkpoint_folder(RUN, 2)


def distilling(student: str, cache: Path, **flags: Any) -> Callable[[], None]:
    config = DistillConfig(
        model=str(ROOT / "data" / "tiny-sd"), cache=cache, run=RUN, student=student, device="cpu",
        threads=1, train_batch_size=2, max_train_steps=3, checkpointing_steps=1, lora_rank=4,
        checkpoints_total_limit=1, resume_from_checkpoint="latest", validation_steps=2,
        logging_steps=1, learning_rate=1e-3, report_to=("none",), unet_time_cond_proj_dim=16,
    )  # fmt: skip
    changed = DistillConfig(**{**vars(config), **flags})
    return lambda: loop.distill(setup.prepare(changed))
