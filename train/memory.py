"""How much memory a step will take, counted before the first one.

The networks of the run are built on torch's meta device, which has shapes and no numbers, and take
one step there: the student's forward, the teacher's with twice the batch, and the backward
pass. `LiveBytes` adds up the storages alive at each moment; the optimizer's state comes on
top. What it cannot see is the workspace of kernels, and fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.conditioning import TextEmbeds
from shared.errors import UserError
from train.config import DistillConfig
from train.meta import LiveBytes, MetaAutocast, fused_attention
from train.speed import hold_frozen
from train.student import add_adapters, guided_copy
from train.teacher import call_unet

TOKENS = 77
ROOM = 0.95  # the rest is for the workspace of kernels, and for fragmentation
META = torch.device("meta")


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device: what lies there between steps, and the most there is during one."""

    weights: int
    optimizer: int
    peak: int

    @property
    def step(self) -> int:
        """What a step needs beyond weights and optimizer: activations and gradients."""
        return self.peak - self.weights - self.optimizer


@dataclass
class MetaNetworks:
    """The UNets of a run without their numbers; a LoRA's three are one."""

    student: UNet2DConditionModel
    target: UNet2DConditionModel
    teacher: UNet2DConditionModel

    def tensors(self) -> list[Tensor]:
        """All weights, each once."""
        unets = (self.student, self.target, self.teacher)
        return [t for unet in dict.fromkeys(unets) for t in unet.state_dict().values()]

    def trainable(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [p for p in self.student.parameters() if p.requires_grad]


def meta_networks(unet_config: Mapping[str, Any], config: DistillConfig) -> MetaNetworks:
    """As `train.student` builds them."""
    with META:
        teacher = UNet2DConditionModel.from_config(unet_config).eval().requires_grad_(False)
        if config.student == "lora":
            add_adapters(teacher, config)
            networks = MetaNetworks(teacher, teacher, teacher)
        else:
            width = config.unet_time_cond_proj_dim
            student, target = (guided_copy(teacher, width, "zero") for _ in range(2))
            networks = MetaNetworks(student.requires_grad_(True), target, teacher)
            if config.offload_ema:
                hold_frozen(target, config.mixed_precision)
    hold_frozen(teacher, config.mixed_precision)
    networks.student.train()
    return networks


def estimate(
    unet_config: Mapping[str, Any], config: DistillConfig, latent_size: tuple[int, int]
) -> Estimate:
    """Of a run with latents of that size. `unet_config` is the teacher's `unet/config.json`."""
    networks = meta_networks(unet_config, config)
    live = LiveBytes()
    live.note(networks.tensors())
    weights = live.now
    trainable = networks.trainable()
    if config.gradient_accumulation_steps > 1:  # gradients of the last micro-step lie there
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
        live.note([parameter.grad for parameter in trainable])
    autocast = MetaAutocast(config.mixed_precision)
    if config.gradient_checkpointing:
        networks.student.enable_gradient_checkpointing(partial(checkpointed, autocast))
    attention = patch("torch.nn.functional.scaled_dot_product_attention", fused_attention)
    with attention, live, autocast:
        loss = forward(networks, config, unet_config, latent_size)
        autocast.copies.clear()
        loss.backward()
    optimizer = sum(adam_bytes(p.numel(), config.use_8bit_adam) for p in trainable)
    return Estimate(weights, optimizer, live.peak + optimizer)


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
    """A scalar of the student's forward, after the teacher's; the target's takes half of that."""
    call = caller(unet_config, latent_size, config)
    count = config.train_batch_size
    output = call(networks.student, count)
    with torch.no_grad():
        call(networks.teacher, 2 * count)
    return output.square().mean()


def caller(
    unet_config: Mapping[str, Any], latent_size: tuple[int, int], config: DistillConfig
) -> Callable[[UNet2DConditionModel, int], Tensor]:
    """A function that calls a UNet with a batch of so many samples."""
    channels, width = unet_config["in_channels"], unet_config["cross_attention_dim"]
    micro = unet_config.get("addition_embed_type") == "text_time"

    def call(unet: UNet2DConditionModel, count: int) -> Tensor:
        def empty(*shape: int) -> Tensor:
            return torch.empty(count, *shape, device=META)

        pooled = ids = guidance = None
        if micro:
            sinusoids = 6 * unet_config["addition_time_embed_dim"]
            pooled = empty(unet_config["projection_class_embeddings_input_dim"] - sinusoids)
            ids = empty(6)
        if unet.config.time_cond_proj_dim is not None:
            guidance = empty(config.unet_time_cond_proj_dim)
        text = TextEmbeds(empty(TOKENS, width), pooled)
        return call_unet(unet, empty(channels, *latent_size), empty().long(), text, ids, guidance)

    return call


def fitting(
    unet_config: Mapping[str, Any], config: DistillConfig, latent_size: tuple[int, int], room: int
) -> tuple[str, Estimate] | None:
    """The first flags, one more at a time, with which a run fits into `room` bytes."""
    words: list[str] = []
    for flags, change in savings(config):
        config = replace(config, **change)
        words.append(flags)
        found = estimate(unet_config, config, latent_size)
        if found.peak <= room:
            return " ".join(words), found
    return None


def savings(config: DistillConfig) -> list[tuple[str, dict[str, Any]]]:
    """Flags that save memory and are not used yet; what changes the run least comes first."""
    found: list[tuple[str, dict[str, Any]]] = []
    if config.mixed_precision == "no":
        found.append(("--mixed-precision bf16", {"mixed_precision": "bf16"}))
    if not config.gradient_checkpointing:
        found.append(("--gradient-checkpointing", {"gradient_checkpointing": True}))
    if config.train_batch_size > 1:
        total = config.train_batch_size * config.gradient_accumulation_steps
        found.append((
            f"--train-batch-size 1 --gradient-accumulation-steps {total}",
            {"train_batch_size": 1, "gradient_accumulation_steps": total},
        ))  # fmt: skip
    if not config.use_8bit_adam:
        found.append(("--use-8bit-adam", {"use_8bit_adam": True}))
    if config.student == "full" and not config.offload_ema:
        found.append(("--offload-ema", {"offload_ema": True}))
    if config.student == "full":
        found.append(("--student lora", {"student": "lora", "offload_ema": False}))
    return found


def memory_line(
    unet_config: Mapping[str, Any], config: DistillConfig, latent_size: tuple[int, int], free: int
) -> str:
    """What a run will take of a device with `free` bytes, and what to do if that is too much.

    Raises UserError where not even the weights have room.
    """
    found = estimate(unet_config, config, latent_size)
    line = (
        f"memory: about {gigabytes(found.peak)} at peak (weights {gigabytes(found.weights)}, "
        f"optimizer {gigabytes(found.optimizer)}, gradients and activations "
        f"{gigabytes(found.step)}) of {gigabytes(free)} free; an estimate"
    )
    room = int(free * ROOM)
    if found.peak <= room:
        return line
    better = fitting(unet_config, config, latent_size, room)
    advice = "no flags make it fit; take a larger device"
    if better is not None:
        advice = f"it fits with {better[0]} (about {gigabytes(better[1].peak)})"
    if found.weights + found.optimizer > free:
        raise UserError(
            f"weights and optimizer take {gigabytes(found.weights + found.optimizer)}, "
            f"{gigabytes(free)} of the device are free: {advice}"
        )
    return f"{line}\nwarning: that is too much for the device: {advice}"


def gigabytes(size: int) -> str:
    """As people read it."""
    return f"{size / 1e9:.1f} GB"
