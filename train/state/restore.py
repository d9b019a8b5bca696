"""A student and its optimizer as a checkpoint has them, each tensor checked before any is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from train.networks.student import Student
from train.state.checkpoint import NETWORKS, OPTIMIZER, REMEDY, load_networks, load_optimizer
from train.state.optim import averages_of, restored
from train.state.tensor_files import check_moments, check_tensors


def restore_networks(folder: Path, student: Student) -> None:
    """Put a student into the state of a checkpoint.

    Raises UserError, naming file and tensor, where the file does not hold just the student's
    tensors, in their shapes and finite.
    """
    stored = load_networks(folder)
    wanted = {name: tensor.shape for name, tensor in student.state().items()}
    check_tensors(folder / NETWORKS, stored, wanted, REMEDY)
    student.load_state(stored)


@dataclass(frozen=True)
class Moments:
    """An optimizer, the weights that it moves by their names, and whether it must have begun."""

    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]
    begun: bool  # otherwise a checkpoint need not hold anything of it


def restore_optimizers(folder: Path, all_moments: Sequence[Moments]) -> None:
    """Put optimizers into the state of a checkpoint. Raises UserError as `restore_networks`."""
    stored = load_optimizer(folder)
    weights = {path.rpartition("/")[0] for path in stored}
    there = [one for one in all_moments if one.begun or weights & one.parameters.keys()]
    owners = {name: one for one in there for name in one.parameters}
    averages = averages_of(all_moments[0].optimizer)
    shapes = {name: one.parameters[name].shape for name, one in owners.items()}
    check_moments(folder / OPTIMIZER, stored, shapes, averages, REMEDY)
    for path, tensor in stored.items():
        name, _, key = path.rpartition("/")
        optimizer, weight = owners[name].optimizer, owners[name].parameters[name]
        optimizer.state[weight][key] = restored(optimizer, key, tensor, weight)
