"""A hash of a network's weights: whether two encoders are the same, whatever file they came in."""

from __future__ import annotations

import hashlib

from torch import nn


def fingerprint(module: nn.Module) -> str:
    """16 hex digits over names, shapes and fp32 values, so an fp16 copy that was cast up agrees."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()[:16]
