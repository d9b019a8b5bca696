"""How much memory a step will take, counted before the first one.

The networks of the run are built on torch's meta device, which has shapes and no numbers, and take
one step there: the student's forward, the teacher's with twice the batch, and the backward
pass. `LiveBytes` adds up the storages alive at each moment; the optimizer's state comes on
top. Of several processes it is what each takes: `Parallelism` knows what DDP adds and FSDP divides.
What it cannot see is the workspace of kernels, and fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.networks.denoiser import Denoiser, call_unet
from shared.networks.precision import hold_frozen
from train.config import DistillConfig
from train.memory.batch import META, meta_conditioning
from train.memory.matched import matched_losses, meta_matched
from train.memory.meta import LiveBytes, MetaAutocast, fused_attention
from train.networks.dtensor import FSDP_BLOCKS
from train.networks.fake import as_it_is
from train.networks.full import guided_copy
from train.networks.lora import add_adapters
from train.networks.matched import MatchedStudent
from train.objectives import asks_teacher, objective_of


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device: what lies there between steps, and the most there is during one."""

    weights: int
    optimizer: int
    peak: int

    @property
    def step(self) -> int:
        """What a step needs beyond weights and optimizer: activations and gradients."""
        return self.peak - self.weights - self.optimizer


@dataclass(frozen=True)
class Parallelism:
    """The processes of a run, as far as their memory goes; see `train.trainer.distributed`."""

    world: int = 1
    fsdp: bool = False  # by FSDP; otherwise several processes are DDP's
    offloaded: bool = False  # the shards lie on the CPU (--fsdp_offload_params)
    gathered: bool = False  # and what was gathered stays (--fsdp_reshard_after_forward false)

    def here(self, tensor: Tensor) -> int:
        """Bytes of a weight, or its gradient, on a device between steps: the first, largest part.

        fully_shard cuts the first dimension into equal parts, of which the last may be smaller.
        """
        if not self.fsdp:
            return tensor.nbytes
        if self.offloaded:
            return 0
        rows = tensor.shape[0] if tensor.dim() else 1
        return tensor.nbytes // rows * -(-rows // self.world)


ALONE = Parallelism()


@dataclass
class MetaNetworks:
    """The UNets of a run without their numbers; a LoRA's three are one.

    Where a full student reads the teacher's answers, its target stands for the teacher.
    """

    student: Denoiser
    target: Denoiser
    teacher: Denoiser
    matched: MatchedStudent | None = None  # of distribution matching, which has these and more

    def unets(self) -> list[Denoiser]:
        """Each once."""
        if self.matched is not None:
            return self.matched.networks()
        return list(dict.fromkeys((self.student, self.target, self.teacher)))

    def modules(self) -> list[nn.Module]:
        """The UNets, and what is in memory besides."""
        return [*self.unets(), *(self.matched.heads() if self.matched else [])]

    def tensors(self) -> list[Tensor]:
        """All weights, each once."""
        return [tensor for module in self.modules() for tensor in module.state_dict().values()]

    def trained_modules(self) -> list[nn.Module]:
        """Where the weights lie that each optimizer moves, in the order of their steps."""
        if self.matched is None:
            return [self.student]
        return [one.module() for one in reversed(self.matched.trained())]

    def trained(self) -> list[list[nn.Parameter]]:
        """What each optimizer moves, in the order of their steps."""
        if self.matched is None:
            return [[p for p in self.student.parameters() if p.requires_grad]]
        return [list(one.trainable().values()) for one in reversed(self.matched.trained())]

    def trainable(self) -> list[nn.Parameter]:
        """What all of them move."""
        return [parameter for parameters in self.trained() for parameter in parameters]


def meta_networks(unet_config: Mapping[str, Any], config: DistillConfig) -> MetaNetworks:
    """As `train.networks.student` builds them."""
    with META:
        teacher = Denoiser.from_config(unet_config).eval().requires_grad_(False)
        if objective_of(config).partner is not None:
            matched = meta_matched(teacher, config)
            return MetaNetworks(matched.unet, matched.unet, teacher, matched)
        if config.student == "lora":
            add_adapters(teacher, config)
            networks = MetaNetworks(teacher, teacher, teacher)
        elif not objective_of(config).needs_target:
            networks = MetaNetworks(*[teacher.requires_grad_(True)] * 3)
        else:
            width = config.unet_time_cond_proj_dim
            student, target = (guided_copy(teacher, width, "zero") for _ in range(2))
            asked = teacher if asks_teacher(config) else target
            networks = MetaNetworks(student.requires_grad_(True), target, asked)
            if config.offload_ema:
                hold_frozen(target, config.mixed_precision)
    hold_frozen(teacher, config.mixed_precision)
    networks.student.train()
    return networks


def estimate(
    unet_config: Mapping[str, Any],
    config: DistillConfig,
    latent_size: tuple[int, int],
    parallelism: Parallelism = ALONE,
) -> MemoryEstimate:
    """Of a run with latents of that size. `unet_config` is the teacher's `unet/config.json`."""
    networks = meta_networks(unet_config, config)
    live = LiveBytes()
    live.note(networks.tensors())
    whole = live.now
    trainable = networks.trainable()
    shared = reduce_gradients(trainable, parallelism)
    live.note(shared)
    autocast = MetaAutocast(config.mixed_precision)
    losses = losses_of(networks, config, unet_config, latent_size, autocast, parallelism.fsdp)
    attention = patch("torch.nn.functional.scaled_dot_product_attention", fused_attention)
    for parameters, loss_of in zip(networks.trained(), losses, strict=True):
        if config.gradient_accumulation_steps > 1:  # gradients of the last micro-step lie there
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            live.note([parameter.grad for parameter in parameters])
        with attention, live, autocast:
            loss = loss_of()
            autocast.copies.clear()
            loss.backward()
        del loss
        for parameter in parameters:
            parameter.grad = None
    weights = sum(map(parallelism.here, networks.tensors()))
    elements = (parallelism.here(parameter) // parameter.itemsize for parameter in trainable)
    optimizer = sum(adam_bytes(count, config.use_8bit_adam) for count in elements)
    step = live.peak - whole + gathered_bytes(networks, parallelism)
    return MemoryEstimate(weights, optimizer, weights + optimizer + step)


def losses_of(
    networks: MetaNetworks,
    config: DistillConfig,
    unet_config: Mapping[str, Any],
    latent_size: tuple[int, int],
    autocast: MetaAutocast,
    fsdp: bool,
) -> list[Callable[[], Tensor]]:
    """What each optimizer's weights are moved by, ready to be computed."""
    again = partial(checkpointed, autocast)
    matched = networks.matched
    if config.gradient_checkpointing:
        for unet in [one.unet for one in matched.trained()] if matched else [networks.student]:
            unet.enable_gradient_checkpointing(again)
    if matched is None:
        return [partial(forward, networks, config, unet_config, latent_size)]
    matched.partner.critic.again = as_it_is if fsdp else again  # as `Critic.forward` does
    return matched_losses(matched, config, unet_config, latent_size)


def reduce_gradients(parameters: Sequence[nn.Parameter], parallelism: Parallelism) -> list[Tensor]:
    """Let backward() leave gradients where DDP or FSDP do; returns the list of what they hold.

    DDP copies each into a bucket that is there all the time; FSDP keeps a shard.
    """
    held: list[Tensor] = []
    if parallelism.world == 1:
        return held

    def move(parameter: Tensor) -> None:
        parameter.grad = None
        if parallelism.fsdp:
            held.append(torch.empty(parallelism.here(parameter), dtype=torch.uint8, device=META))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(move)
    if not parallelism.fsdp:
        held += [torch.empty_like(parameter) for parameter in parameters]
    return held


def gathered_bytes(networks: MetaNetworks, parallelism: Parallelism) -> int:
    """What FSDP has whole at the most: weights that were gathered, gradients to be divided."""
    if not parallelism.fsdp:
        return 0
    whole = [two_blocks(module, set(module.parameters())) for module in networks.modules()]
    weights = sum(t.nbytes for t in networks.tensors()) if parallelism.gathered else max(whole)
    moved = zip(networks.trained_modules(), networks.trained(), strict=True)
    return weights + max(two_blocks(module, set(parameters)) for module, parameters in moved)


def two_blocks(module: nn.Module, counted: Set[nn.Parameter]) -> int:
    """Bytes of what lies in no block, and of two of the largest: the next is on its way."""

    def size(part: nn.Module) -> int:
        return sum(weight.nbytes for weight in part.parameters() if weight in counted)

    blocks = [part for part in module.modules() if type(part).__name__ in FSDP_BLOCKS]
    return size(module) - sum(sorted(map(size, blocks))[:-2])


def checkpointed(autocast: MetaAutocast, block: nn.Module, *inputs: Any) -> Any:
    """A block whose activations are computed again: under autocast, which backward() leaves."""
    return checkpoint(
        block.__call__, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), autocast)
    )


def adam_bytes(elements: int, in_8_bits: bool) -> int:
    """AdamW's two averages of a weight: fp32, or bytes with fp32 scales for blocks of 256."""
    if not in_8_bits or elements < 4096:
        return 8 * elements
    return 2 * (elements + 4 * -(-elements // 256) + 4 * 256)


def forward(
    networks: MetaNetworks,
    config: DistillConfig,
    unet_config: Mapping[str, Any],
    latent_size: tuple[int, int],
) -> Tensor:
    """A scalar of the student's forward, after the teacher's; the target's takes half of that.

    Where the teacher's answers are in the cache, there is the target's alone.
    """
    count = config.train_batch_size
    output = forward_of(networks.student, unet_config, latent_size, count)
    with torch.no_grad():
        if asks_teacher(config):
            forward_of(networks.teacher, unet_config, latent_size, 2 * count)
        elif objective_of(config).needs_target:
            forward_of(networks.target, unet_config, latent_size, count)
    return output.square().mean()


def forward_of(
    unet: Denoiser, unet_config: Mapping[str, Any], latent_size: tuple[int, int], count: int
) -> Tensor:
    """The output of a UNet for a batch of so many samples; `unet_config` is the teacher's."""
    text, ids = meta_conditioning(unet_config, count, torch.float32)
    z = torch.empty(count, unet_config["in_channels"], *latent_size, device=META)
    width = unet.config.time_cond_proj_dim
    guidance = None if width is None else torch.empty(count, width, device=META)
    return call_unet(
        unet, z, torch.empty(count, dtype=torch.int64, device=META), text, ids, guidance
    )
