"""What it takes to count a step's memory on torch's meta device: a counter, and CUDA's ways."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from shared.networks.precision import DTYPES

# What CUDA's autocast computes in half precision, and what in fp32; the rest takes what it gets.
HALF = ("linear", "conv2d", "matmul", "bmm", "baddbmm")
FULL = ("group_norm", "layer_norm", "softmax")


class LiveBytes(TorchDispatchMode):
    """Counts each storage once, from the operation that makes it until its last tensor is gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(result)
        return result

    def note(self, tensors: Any) -> None:
        """Count storages that are new."""
        for tensor in tree_iter(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


class MetaAutocast(TorchFunctionMode):
    """CUDA's autocast for meta tensors, which torch.autocast does not know.

    Like it, it casts a trained fp32 weight once per step and keeps the copy until the end.
    """

    def __init__(self, mixed_precision: str | None) -> None:
        super().__init__()
        self.dtype = DTYPES.get(mixed_precision or "no")
        self.copies: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if self.dtype is not None and (name in HALF or name in FULL):
            cast = self.half if name in HALF else self.full
            args = tuple(map(cast, args))
            kwargs = {key: cast(value) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def half(self, value: Any) -> Any:
        """In the autocast dtype."""
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        copy = self.copies.get(id(value))
        if copy is None or torch.is_grad_enabled() > copy.requires_grad:  # made without gradients
            copy = self.copies[id(value)] = value.to(self.dtype)
        return copy

    def full(self, value: Any) -> Any:
        """In fp32."""
        half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if half else value


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """What CUDA's fused kernels keep: no matrix of weights, but query, key, value and result."""
    result: Tensor
    result, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True
    )
    return result
