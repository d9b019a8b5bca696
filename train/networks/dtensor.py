"""Tensors that FSDP may have sharded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """A norm or sum that may be a DTensor, as a plain tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, without communication."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def restore(into: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, which every process has read, into a tensor that may be sharded."""
    into.copy_(like(into, value))


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """`value`, which every process has whole, as `tensor` lies: its device, shards and strides."""
    if isinstance(tensor, DTensor):
        value = value.to(device=tensor.device)
        # Nothing is sent: each takes its part of what it has read itself.
        return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return torch.empty_like(tensor, dtype=value.dtype).copy_(value)


FSDP_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")  # each is gathered by itself
