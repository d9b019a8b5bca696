"""The processes of a run: one, or as many as accelerate has started.

`accelerate launch -m train distill ...` (or torchrun) starts them. Gradients are averaged by DDP,
or weights are sharded by FSDP where accelerate asks for it; the sample stream is divided in
`train.data.order`, which is why nothing else here knows of data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor
from torch.distributed import DistNetworkError
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shared.errors import UserError, first_line
from shared.machine.device import pick_device
from shared.networks.denoiser import Denoiser
from train.config import RunConfig
from train.networks.dtensor import FSDP_BLOCKS
from train.networks.student import Student, Trained
from train.trainer.launch import join

# The others wait while one saves, draws previews or uploads; NCCL would give up after ten minutes.
PATIENCE = timedelta(hours=6)
LAUNCHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed has not been tested with this trainer",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM has no UNet",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor and context parallelism are not for a UNet",
}


class Distributed:
    """What a process needs to know of the others. Every method is entered by all of them."""

    def __init__(self, device: str = "auto") -> None:
        refuse_launchers()
        started = join()
        alone = pick_device(device)
        try:
            self.accelerator = Accelerator(
                cpu=alone.type == "cpu",  # or it would not see the other processes
                mixed_precision="no",  # the trainer has one explicit autocast of its own
                kwargs_handlers=[
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                    InitProcessGroupKwargs(timeout=PATIENCE),
                ],
            )
        except DistNetworkError as error:
            raise UserError(
                f"the {started} processes cannot meet ({first_line(error)}); export MASTER_ADDR "
                "and a free MASTER_PORT, or check the launcher's"
            ) from None
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if self.world != started:
            raise UserError(
                f"a launcher has started {started} processes, which --device {device} cannot join; "
                "leave the flag out, or start one process"
            )
        self.main = self.rank == 0
        if self.world > 1 and alone.index is not None:
            raise UserError(
                f"--device {device}: each of {self.world} processes takes a GPU of its own; "
                "leave the number out"
            )
        self.device = alone if self.world == 1 else self.accelerator.device
        self.fsdp = self.world > 1 and asked("ACCELERATE_USE_FSDP")

    def wrap(self, student: Student) -> None:
        """Move the student to the device, and let its gradients or its weights be shared."""
        if self.fsdp:
            for module in (*student.networks(), *student.heads()):
                apply_fsdp(module, FullyShardedDataParallelPlugin())
            return
        for module in (*student.networks(), *student.heads()):
            module.to(self.device)
        if self.world > 1:
            for network in student.trained():
                with alone(network, student):
                    network.live = self.accelerator.prepare_model(network.module())

    @contextmanager
    def accumulating(self, network: Trained, last: bool) -> Iterator[None]:
        """Gradients of a micro-batch stay here until those of the last one are averaged."""
        if last or self.world == 1:
            yield
        elif isinstance(network.live, DistributedDataParallel):
            with network.live.no_sync():
                yield
        else:
            shards = [m for m in network.module().modules() if isinstance(m, FSDPModule)]
            for shard in shards:
                shard.set_requires_gradient_sync(False, recurse=False)
            yield
            for shard in shards:
                shard.set_requires_gradient_sync(True, recurse=False)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.world == 1:
            return value
        mean: Tensor = self.accelerator.reduce(value, "mean")
        return mean

    def collect(self, value: Tensor) -> Tensor:
        """What each process has, `[...]` of one shape everywhere: `[world, ...]`, for all."""
        if self.world == 1:
            return value[None]
        every: Tensor = self.accelerator.gather(value[None].to(self.device))
        return every.to(value.device)

    def wait(self) -> None:
        """Go on when all have come so far."""
        self.accelerator.wait_for_everyone()

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sharded tensors made whole, on the main process's CPU; the others get nothing."""
        whole = {}
        for name, tensor in tensors.items():
            value = tensor.detach()
            if isinstance(value, DTensor):
                value = value.full_tensor()
            if self.main:
                whole[name] = value.cpu()
        return whole


def refuse_launchers() -> None:
    """Raise UserError for what accelerate can start and this trainer cannot."""
    for name, why in LAUNCHERS.items():
        if asked(name):
            raise UserError(f"{why}; launch with --multi_gpu, or --use_fsdp --fsdp_version 2")
    if asked("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP here is torch's fully_shard; add --fsdp_version 2 to the launcher")


def as_launched(config: RunConfig) -> RunConfig:
    """The flags, and where they were left alone what accelerate's launcher was told.

    Raises UserError for a precision that the trainer does not have, and for processes that a
    launcher has started and that could not find each other.
    """
    join()
    precision: Any = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp8":
        raise UserError("--mixed_precision fp8 is not for this trainer; launch with bf16")
    # It says "no" also where nobody has asked it for a precision.
    if config.mixed_precision is None and precision != "no":
        config = replace(config, mixed_precision=precision)
    accumulation = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))
    untyped = "gradient_accumulation_steps" not in config.typed
    if config.gradient_accumulation_steps == 1 and untyped:
        config = replace(config, gradient_accumulation_steps=accumulation)
    return config


def asked(name: str) -> bool:
    """Has accelerate's launcher set this switch?"""
    return os.environ.get(name, "false").lower() in ("true", "1")


@contextmanager
def alone(network: Trained, student: Student) -> Iterator[None]:
    """Let nothing else seem to be trained: DDP waits for the gradients of all that does."""
    others = [one for one in student.trained() if one is not network]
    weights = [weight for one in others for weight in one.trainable().values()]
    for weight in weights:
        weight.requires_grad_(False)
    yield
    for weight in weights:
        weight.requires_grad_(True)


def apply_fsdp(unet: Denoiser, plugin: FullyShardedDataParallelPlugin) -> None:
    """Apply torch's fully_shard to every block, then to what is left.

    Of the plugin count `--fsdp_reshard_after_forward` and `--fsdp_offload_params`.
    """
    offload = plugin.cpu_offload
    policy = offload if isinstance(offload, CPUOffloadPolicy) else OffloadPolicy()
    options = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": policy}
    unet.to(memory_format=torch.contiguous_format)  # the only one that fully_shard takes
    for module in list(unet.modules()):
        if type(module).__name__ in FSDP_BLOCKS:
            fully_shard(module, **options)
    fully_shard(unet, **options)
