"""How small and how fast the networks of a run are: attention, compilation, TF32."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.errors import UserError, first_line
from shared.networks.denoiser import Denoiser
from shared.networks.precision import DTYPES
from train.config import DistillConfig

COMPILED = ("BasicTransformerBlock", "ResnetBlock2D")  # where a UNet's time goes
RECOMPILES = 64  # torch's limit of 8 is for one network, not for blocks of all sizes in three roles


def check_speed(
    config: DistillConfig, device: torch.device, fsdp: bool = False, sizes: int = 1
) -> None:
    """Raise UserError for flags that cannot work here, or would do nothing.

    `sizes` is how many latent sizes the cache has. Each would be compiled by itself, for minutes,
    until torch's limit leaves the rest as they are.
    """
    no_cuda = device.type != "cuda" and f"wants a CUDA device, this is a {device.type}"
    several = sizes > 1 and f"is for latents of one size, and the cache has {sizes}"
    sharded = fsdp and "does not work on weights that FSDP has sharded"
    for flag, given, problem in (
        ("--allow-tf32", config.allow_tf32, no_cuda),
        ("--attention xformers", config.attention == "xformers", no_cuda),
        ("--compile", config.compile, several),
        ("--offload-ema", config.offload_ema, sharded),
        ("--use-8bit-adam", config.use_8bit_adam, sharded),
    ):
        if given and problem:
            raise UserError(f"{flag} {problem}; leave it out")
    if config.compile:
        check_compiler(device)
    if config.offload_ema and config.mixed_precision not in DTYPES:
        raise UserError(
            "--offload-ema saves memory by a half-precision copy on the device, which wants "
            "--mixed-precision bf16"
        )


def check_compiler(device: torch.device) -> None:
    """Raise UserError where torch.compile would find no compiler for what it writes."""
    if device.type != "cuda":
        if not shutil.which(os.environ.get("CXX", "g++")):
            raise UserError("--compile wants a C++ compiler (g++, or CXX); leave it out")
        return
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]  # as Triton looks
    if not any(map(shutil.which, compilers)):
        raise UserError("--compile wants a C compiler (gcc, clang, or CC); leave it out")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise UserError(
            "--compile wants Python's headers (Python.h, of a package such as python3-dev); "
            "install them, or leave it out"
        )


def speed_up(unets: Sequence[Denoiser], config: DistillConfig, device: torch.device) -> None:
    """Give all networks of a run the attention, compilation and precision that the flags ask for.

    Raises UserError where xformers is not installed.
    """
    torch.backends.cudnn.allow_tf32 = config.allow_tf32  # convolutions use it by torch's default
    if config.allow_tf32:
        torch.set_float32_matmul_precision("high")
    for unet in unets:
        if config.attention == "xformers":
            use_xformers(unet)
        if config.compile:
            compile_blocks(unet)


def use_xformers(unet: Denoiser) -> None:
    """Raise UserError where xformers is not installed, or not for this GPU."""
    try:
        unet.enable_xformers_memory_efficient_attention()
    except (ImportError, NotImplementedError, ValueError) as error:
        first = first_line(error)
        raise UserError(
            f"--attention xformers cannot be used ({first}); `pip install xformers` for this "
            "torch, or leave it out: torch's own attention is as fast on recent GPUs"
        ) from None


def compile_blocks(unet: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a UNet's repeated blocks in place, each kind and size once for all its places.

    The student, the target and the teacher (no gradients, or adapters off) each get code of their
    own the first time; after that nothing is compiled again.
    """
    torch._dynamo.config.recompile_limit = RECOMPILES
    for module in unet.modules():
        if type(module).__name__ in COMPILED:
            module.compile(backend=backend, dynamic=False)
