"""In which precision networks compute, and hold what is frozen."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["no", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def device_precision(device: torch.device) -> Precision:
    """bf16 where a GPU has it, fp16 on an older one; no, that is fp32, elsewhere."""
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(mixed_precision: str | None, device: torch.device) -> AbstractContextManager[Any]:
    """The one dtype in which all networks compute."""
    dtype = DTYPES.get(mixed_precision or "no")
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """What is computed in here keeps its dtype; of a device that knows no autocast all does."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def hold_frozen(unet: nn.Module, mixed_precision: str | None) -> None:
    """Keep the frozen weights of linear layers and convolutions in the autocast dtype.

    Autocast would round just these, in just this way, in every forward: results stay the same to
    the bit, at half the memory. Norms and whatever is trained stay fp32.
    """
    dtype = DTYPES.get(mixed_precision or "no")
    if dtype is None:
        return
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
