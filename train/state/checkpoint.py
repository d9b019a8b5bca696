"""Checkpoints that are whole or absent: written beside, fsynced, renamed; only then the old go.

A run that goes on from an older checkpoint begins a branch. The branch's number, which is in each
state.json, comes before the step where `latest` and the oldest are looked for.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shared.errors import UserError, first_line
from shared.storage import ownership
from shared.storage.files import (
    dump_json,
    file_sizes,
    load_record,
    move,
    publish,
    sync_folder,
    workshop,
)
from shared.storage.temporary import temporary
from shared.storage.tensors import load_tensors, tensor_chunks
from shared.storage.typed_json import not_negative, record_of, typed
from train.state.optim import Scaler, saved

REMEDY = "resume from another checkpoint, or restore it"
RESUME = "--resume-from-checkpoint"
STATE = "state.json"
TENSORS = NETWORKS, OPTIMIZER = "networks.safetensors", "optimizer.safetensors"


@dataclass(frozen=True)
class TrainingState:
    """How far a run has come: what state.json says, in its words."""

    step: int  # optimizer steps taken
    position: int  # samples consumed; skipped fp16 steps consume theirs, too
    batch_size: int  # samples a step, over all processes
    terms: Mapping[str, Any]  # `run_invariants` of resume_checks.py: what a resume must repeat
    scaler: Mapping[str, Any] = field(default_factory=dict)  # of the fp16 loss, where there is one
    branch: int = 0  # one more whenever a run goes on from another checkpoint than its latest


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: state.json, and the files of tensors by name.

    No random state is among it: every draw is a function of seed and position or step.
    """

    state: TrainingState
    networks: Mapping[str, Tensor]  # `Student.state`
    optimizer: Mapping[str, Tensor]  # `optimizer_state`


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(run: Path, whole: Checkpoint, total_limit: int | None) -> Path:
    """Write a whole checkpoint of CPU tensors, then prune the oldest beyond `total_limit`."""
    final = checkpoint_folder(run, whole.state.step)
    tmp = run / "tmp"
    with workshop(tmp, f"-{final.name}") as building:
        for name, tensors in ((NETWORKS, whole.networks), (OPTIMIZER, whole.optimizer)):
            publish(tensor_chunks(tensors), building / name, tmp)
        state = {**vars(whole.state), "files": file_sizes(building)}
        publish([dump_json(state)], building / STATE, tmp)
        sync_folder(building)
        if final.exists():  # of an earlier, longer run that was resumed from before it
            remove(final, tmp)
        move(building, final)
        prune(run, total_limit, final)  # in here, where a full disk need not make room for it
    return final


def prune(run: Path, total_limit: int | None, newest: Path) -> None:
    """Remove the oldest checkpoints beyond the limit, never the one just written."""
    if total_limit is not None:
        others = [folder for folder in whole_checkpoints(run) if folder != newest]
        for old in others[: max(len(others) + 1 - max(total_limit, 1), 0)]:
            remove(old, run / "tmp")


def remove(folder: Path, tmp: Path) -> None:
    """Delete a checkpoint: out of sight first, so that no part of it is ever seen or left over."""
    with temporary(tmp, f"-{folder.name}") as gone:
        ownership.check(folder)
        os.replace(folder, gone)
        sync_folder(folder.parent)


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json, as far as it takes to tell its age and its files.

    Raises UserError where it is missing or damaged.
    """

    def build(stored: Mapping[str, Any]) -> dict[str, Any]:
        step, branch = typed(stored["step"], int, "step"), stored.get("branch", 0)
        not_negative(step=step, branch=typed(branch, int, "branch"))
        files = typed(stored.get("files", {}), Mapping[str, int], "files")
        return {**stored, "step": step, "branch": branch, "files": files}

    return load_record(folder / STATE, build, REMEDY)


def whole_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints in the order in which they came about, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted((folder for folder in folders if not damage(folder)), key=age)


def age(folder: Path) -> tuple[int, int]:
    """What a whole checkpoint is sorted by: its branch, then its step."""
    state = read_state(folder)
    return state["branch"], state["step"]


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, by its state and its files' sizes and headers, or nothing.

    What a newer version wrote is not damaged: it is to be refused, and not passed over.
    """
    if not os.path.lexists(folder / STATE):
        return f"no {STATE}"
    try:
        wanted = read_state(folder)["files"]
    except UserError as error:
        return str(error)
    found = file_sizes(folder)
    for name in TENSORS:
        if name not in found:
            return f"no {name}"
        if found[name] != wanted.get(name, found[name]):  # older checkpoints do not tell
            return f"{name} has {found[name]:,} of {wanted[name]:,} bytes"
        try:
            with safe_open(folder / name, "pt"):  # which reads no more than its header
                pass
        except (OSError, SafetensorError) as error:
            return f"{name}: {first_line(error)}"
    return ""


def find_checkpoint(run: Path, wanted: str | None, flag: str = RESUME) -> Path | None:
    """The checkpoint that `flag` names: `latest` (None if there is none yet), a step or a folder.

    Raises UserError where there is no such checkpoint or it is not whole, where none is, or where
    the run has checkpoints that nobody asked to resume from.
    """
    if wanted is None:
        if existing := sorted((run / "checkpoints").glob(f"step-*/{STATE}")):
            raise UserError(
                f"{run} already holds checkpoints up to {existing[-1].parent.name}; go on with "
                f"{RESUME} latest, or choose another --run"
            )
        return None
    if wanted == "latest":
        folders = sorted((run / "checkpoints").glob("step-*"))
        damaged = {folder: problem for folder in folders if (problem := damage(folder))}
        if folders and len(damaged) == len(folders):
            raise UserError(
                f"no checkpoint in {run} is whole ({folders[-1].name}: {damaged[folders[-1]]}); "
                "restore one, or choose another --run"
            )
        for folder, problem in damaged.items():
            print(f"note: {folder} is damaged ({problem}) and left out", file=sys.stderr)
        return latest_checkpoint(run)
    folder = named_checkpoint(run, wanted, flag)
    if problem := damage(folder):
        raise UserError(
            f"{flag} {folder}: not a whole checkpoint ({problem}); "
            "choose another, or latest for the last whole one"
        )
    return folder


def named_checkpoint(run: Path, wanted: str, flag: str) -> Path:
    """The folder that `step-N`, diffusers' `checkpoint-N`, N or a path means.

    Raises UserError, naming those that there are, where the run has none of that step.
    """
    folder = Path(wanted)
    named = re.fullmatch(r"(?:(?:step|checkpoint)-)?0*(\d+)", folder.name)
    if folder.exists() or not named:
        return folder
    if len(folder.parts) > 1:  # of the run that the path leads to, without the zeros
        return folder.with_name(checkpoint_folder(run, int(named[1])).name)
    found = checkpoint_folder(run, int(named[1]))
    if not found.exists():
        others = ", ".join(path.name for path in whole_checkpoints(run)) or "none yet"
        raise UserError(
            f"{flag} {wanted}: {run} has no checkpoint of step {named[1]}; "
            f"choose of those it has ({others}), or latest"
        )
    return found


def latest_checkpoint(run: Path) -> Path | None:
    """The last whole checkpoint, if there is any."""
    existing = whole_checkpoints(run)
    return existing[-1] if existing else None


def start_branch(run: Path, resumed: Path | None) -> int:
    """The branch on which a run goes on from `resumed`; its checkpoint moves to that branch.

    Where the run has checkpoints that came after it, a line says what becomes of them. The branch
    begins with the checkpoint resumed from, which is the latest at once: whatever happens before
    the next is written, `latest` and metrics.jsonl agree.
    """
    latest = latest_checkpoint(run)
    if resumed is None or latest is None:
        return 0
    branch = age(latest)[0]
    if resumed.resolve() == latest.resolve():
        return branch
    if resumed.resolve().parent == latest.resolve().parent:
        state = {**read_state(resumed), "branch": branch + 1}
        publish([dump_json(state)], resumed / STATE, run / "tmp")
    print(
        f"note: the run goes on from {resumed}, so {latest.name} is no longer its latest; it stays "
        "until --checkpoints-total-limit or a new checkpoint of its step removes it",
        file=sys.stderr,
    )
    return branch + 1


def read_progress(folder: Path) -> TrainingState:
    """A checkpoint's state.json. Raises UserError where it is damaged, or a newer version's."""

    def build(stored: Mapping[str, Any]) -> TrainingState:
        known = {name: value for name, value in stored.items() if name != "files"}
        progressed = record_of(TrainingState, known)
        numbers = (progressed.step, progressed.position, progressed.branch)
        if min(numbers) < 0 or progressed.batch_size < 1:
            raise ValueError("a number in it is below what can be")
        if progressed.scaler and record_of(Scaler, progressed.scaler).scale <= 0:
            raise ValueError("the scale of the loss is not above 0")
        return progressed

    return load_record(folder / STATE, build, REMEDY)


def load_networks(folder: Path) -> dict[str, Tensor]:
    """What `Student.state` gave. Raises UserError for a damaged file."""
    return load_tensors(folder / NETWORKS, REMEDY)


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    """What `optimizer_state` gave. Raises UserError for a damaged file."""
    return load_tensors(folder / OPTIMIZER, REMEDY)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """AdamW's tensors as `PARAMETER/exp_avg` and so on."""
    return {
        f"{name}/{key}": saved(key, value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
