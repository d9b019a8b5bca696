"""A hash of a network's weights: whether two are the same, whatever file they came in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn


def fingerprint(module: nn.Module) -> str:
    """Hash names, shapes and fp32 values to 16 hex digits: an fp16 copy that was cast up agrees."""
    return tensors_fingerprint(module.state_dict())


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the same over tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def signs(parameters: Iterable[nn.Parameter]) -> str:
    """16 hex digits over the signs of weights, by which a teacher is told.

    Signs do not change when weights are rounded to half precision, so a run may go on with another
    --mixed-precision; some do in any further training of a teacher. Those on the meta device have
    none.
    """
    digest = hashlib.sha256()
    for parameter in parameters:
        if not parameter.is_meta:
            digest.update(np.packbits(torch.signbit(parameter).cpu().numpy().ravel()).data)
    return digest.hexdigest()[:16]
