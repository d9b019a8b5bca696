"""Checkpoints that are whole or absent: written beside, fsynced, renamed; only then the old go."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from shared.cache import differences
from shared.errors import UserError
from shared.storage import dump_json, guard, load_json, move, publish, sync_folder, temporary
from train.optim import restored, saved

NETWORKS, OPTIMIZER, STATE = "networks.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Progressed:
    """How far a run has come. `terms` is what must not change across a resume."""

    step: int  # optimizer steps taken
    position: int  # samples consumed; skipped fp16 steps consume theirs, too
    batch_size: int  # samples a step, over all processes
    terms: Mapping[str, Any]
    scaler: Mapping[str, Any] = field(default_factory=dict)  # of the fp16 loss, where there is one


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    run: Path,
    progressed: Progressed,
    networks: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    total_limit: int | None,
) -> Path:
    """Write a whole checkpoint of CPU tensors, then prune the oldest beyond `total_limit`."""
    final = checkpoint_folder(run, progressed.step)
    tmp = run / "tmp"
    building = temporary(tmp, f"-{final.name}")
    with guard(run):
        building.mkdir(parents=True, exist_ok=True)
    for name, tensors in ((NETWORKS, networks), (OPTIMIZER, optimizer)):
        content = {key: tensor.contiguous() for key, tensor in tensors.items()}
        publish([save(content)], building / name, tmp)
    publish([dump_json(vars(progressed))], building / STATE, tmp)
    sync_folder(building)
    if final.exists():  # of an earlier, longer run that was resumed from before it
        remove(final)
    move(building, final)
    prune(run, total_limit, final)
    return final


def prune(run: Path, total_limit: int | None, newest: Path) -> None:
    """Remove the oldest checkpoints beyond the limit, never the one just written."""
    if total_limit is not None:
        others = [folder for folder in whole_checkpoints(run) if folder != newest]
        for old in others[: max(len(others) + 1 - max(total_limit, 1), 0)]:
            remove(old)


def remove(folder: Path) -> None:
    """Delete a checkpoint; without its state.json it is none, however far this gets."""
    (folder / STATE).unlink()
    sync_folder(folder)
    shutil.rmtree(folder)


def whole_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(path.parent for path in (run / "checkpoints").glob(f"step-*/{STATE}"))


def find_checkpoint(run: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: None, `latest` (None if there is none yet) or a folder.

    Raises UserError where the folder is no checkpoint, or where the run has checkpoints that
    nobody asked to resume from.
    """
    existing = whole_checkpoints(run)
    if wanted is None:
        if existing:
            raise UserError(
                f"{run} already holds checkpoints up to {existing[-1].name}; go on with "
                "--resume-from-checkpoint latest, or choose another --run"
            )
        return None
    if wanted == "latest":
        return existing[-1] if existing else None
    folder = Path(wanted)
    if not (folder / STATE).is_file():
        raise UserError(f"--resume-from-checkpoint {folder}: not a whole checkpoint (no {STATE})")
    return folder


def read_progress(folder: Path) -> Progressed:
    """A checkpoint's state.json. Raises UserError for one that another version wrote."""
    try:
        return Progressed(**load_json(folder / STATE))
    except TypeError:
        raise UserError(
            f"{folder} was written by another version of this trainer; export it with that one, "
            "or choose another --run"
        ) from None


def check_terms(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError, naming what differs, where a run would not be the same run."""
    if differing := differences(stored, wanted):
        raise UserError(
            f"{folder} belongs to another run: {differing}; give the same flags, or another --run"
        )


def load_networks(folder: Path) -> dict[str, Tensor]:
    """What `Student.state` gave."""
    return load_file(folder / NETWORKS)


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    """What `optimizer_state` gave."""
    return load_file(folder / OPTIMIZER)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """AdamW's tensors as `PARAMETER/exp_avg` and so on."""
    return {
        f"{name}/{key}": saved(key, value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    stored: Mapping[str, Tensor],
) -> None:
    """The inverse of `optimizer_state`."""
    for path, tensor in stored.items():
        name, _, key = path.rpartition("/")
        weight = parameters[name]
        optimizer.state[weight][key] = restored(optimizer, key, tensor, weight)
