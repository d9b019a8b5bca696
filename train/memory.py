"""How much memory a step will take, counted before the first one.

The networks of the run are built on torch's meta device, which has shapes and no numbers, and take
one step there: the student's forward, the teacher's with twice the batch, the target's, and the
backward pass. `LiveBytes` adds up the storages alive at each moment; the optimizer's state comes on
top. What it cannot see is the workspace of kernels, and fragmentation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from shared.conditioning import TextEmbeds
from train.config import DistillConfig
from train.speed import DTYPES, hold_frozen
from train.student import add_adapters, guided_copy
from train.teacher import call_unet

TOKENS = 77
META = torch.device("meta")
# What CUDA's autocast computes in half precision, and what in fp32; the rest takes what it gets.
HALF = ("linear", "conv2d", "matmul", "bmm", "baddbmm")
FULL = ("group_norm", "layer_norm", "softmax")


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


class LiveBytes(TorchDispatchMode):
    """Counts each storage once, from the operation that makes it until its last tensor is gone."""

    def __init__(self) -> None:
        super().__init__()
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

    def __init__(self, mixed_precision: str) -> None:
        super().__init__()
        self.dtype = DTYPES.get(mixed_precision)
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
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(self.dtype)
        return self.copies[id(value)]

    def full(self, value: Any) -> Any:
        """In fp32."""
        half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if half else value


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """What CUDA's fused kernels keep: no matrix of weights, but query, key, value and result."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]


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
    if config.gradient_checkpointing:
        networks.student.enable_gradient_checkpointing()
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
    attention = patch("torch.nn.functional.scaled_dot_product_attention", fused_attention)
    with attention, live, MetaAutocast(config.mixed_precision) as autocast:
        loss = forward(networks, config, unet_config, latent_size)
        autocast.copies.clear()
        loss.backward()
    optimizer = sum(adam_bytes(p.numel(), config.use_8bit_adam) for p in trainable)
    return Estimate(weights, optimizer, live.peak + optimizer)


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
    """A scalar at the end of the three forwards of a step, in the order of `objectives.lcd`."""
    call = caller(unet_config, latent_size, config)
    count = config.train_batch_size
    output = call(networks.student, count)
    with torch.no_grad():
        call(networks.teacher, 2 * count)
        call(networks.target, count)
    return output.square().mean()


def caller(
    unet_config: Mapping[str, Any], latent_size: tuple[int, int], config: DistillConfig
) -> Callable[[UNet2DConditionModel, int], Tensor]:
    """A function that calls a UNet with a batch of so many samples."""
    channels, width = unet_config["in_channels"], unet_config["cross_attention_dim"]
    micro = unet_config.get("addition_embed_type") == "text_time"

    def call(unet: UNet2DConditionModel, count: int) -> Tensor:
        with META:
            pooled = ids = guidance = None
            if micro:
                sinusoids = 6 * unet_config["addition_time_embed_dim"]
                pooled = torch.empty(
                    count, unet_config["projection_class_embeddings_input_dim"] - sinusoids
                )
                ids = torch.empty(count, 6, dtype=torch.int32)
            if unet.config.time_cond_proj_dim is not None:
                guidance = torch.empty(count, config.unet_time_cond_proj_dim)
            text = TextEmbeds(torch.empty(count, TOKENS, width), pooled)
            z = torch.empty(count, channels, *latent_size)
            t = torch.empty(count, dtype=torch.int64)
            return call_unet(unet, z, t, text, ids, guidance)

    return call
