"""A student and its optimizer as a checkpoint has them, each tensor checked before any is used."""

from __future__ import annotations

from collections.abc import Mapping
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


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], folder: Path
) -> None:
    """Put an optimizer into the state of a checkpoint. Raises UserError as `restore_networks`."""
    stored = load_optimizer(folder)
    averages = averages_of(optimizer)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    check_moments(folder / OPTIMIZER, stored, shapes, averages, REMEDY)
    for path, tensor in stored.items():
        name, _, key = path.rpartition("/")
        weight = parameters[name]
        optimizer.state[weight][key] = restored(optimizer, key, tensor, weight)
