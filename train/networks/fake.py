"""The fake score of distribution matching, and a head that tells generated latents from real ones.

The fake score is a denoiser that learns what the student draws (arXiv 2405.14867).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from shared.cache.conditioning import TextEmbeds
from shared.networks.denoiser import Denoiser, call_unet

WIDTH = 256  # channels of the head, at the most


class Head(nn.Module):
    """A logit `[B]` from the features in a UNet's middle: high for what looks real."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = min(channels, WIDTH)
        self.layers = nn.Sequential(*halving(channels, width), *halving(width, width))
        self.logit = nn.Conv2d(width, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Of features `[B, channels, h, w]`."""
        logits: Tensor = self.logit(self.layers(features))
        return logits.mean((1, 2, 3))


def halving(channels: int, width: int) -> tuple[nn.Module, ...]:
    """A convolution to half the size, and what makes it a layer."""
    convolution = nn.Conv2d(channels, width, 3, stride=2, padding=1)
    return convolution, nn.GroupNorm(math.gcd(32, width), width), nn.SiLU()


class Critic(nn.Module):
    """A UNet and, for the GAN term, a head on its middle features."""

    def __init__(self, unet: Denoiser, head: Head | None) -> None:
        super().__init__()
        self.unet, self.head = unet, head
        # Nothing here is drawn at random, so that there is no state to keep.
        self.again: Callable[..., Any] = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )

    def forward(
        self, z: Tensor, t: Tensor, text: TextEmbeds, time_ids: Tensor | None, *real: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The UNet's output at (z, t), and the head's logits of z, followed by those of `real`.

        Of real latents at the same noise only the features are wanted. They are computed again in
        the backward pass, which comes to them last: what the UNet keeps for z is free by then.
        """
        if self.head is None:
            return call_unet(self.unet, z, t, text, time_ids), None
        half = first_half(self.unet)
        # FSDP has given weights back by the time that features would be computed again.
        again = as_it_is if isinstance(self.unet, FSDPModule) else self.again
        features = [again(call_unet, half, one, t, text, time_ids) for one in real]
        hook = self.unet.mid_block.register_forward_hook(
            lambda module, inputs, output: features.insert(0, output)
        )
        try:
            output = call_unet(self.unet, z, t, text, time_ids)
        finally:
            hook.remove()
        return output, torch.cat([self.logits(one) for one in features])

    def judge(
        self, z: Tensor, t: Tensor, text: TextEmbeds, time_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The output without gradients, and logits whose slope at z can be asked for."""
        with torch.no_grad():
            output = call_unet(self.unet, z, t, text, time_ids)
        if self.head is None:
            return output, None
        return output, self.logits(call_unet(first_half(self.unet), z, t, text, time_ids))

    def logits(self, features: Tensor) -> Tensor:
        """The head's, `[B]` in the dtype of its weights."""
        assert self.head is not None
        dtype = self.head.logit.weight.dtype
        logits: Tensor = self.head(features.to(dtype))
        return logits.to(dtype)


def as_it_is(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function, and keep what its backward pass wants."""
    return function(*inputs)


def first_half(unet: Denoiser) -> Denoiser:
    """The same UNet up to its middle, whose features it returns; all weights are shared."""
    half = Denoiser.__new__(Denoiser)  # FSDP's copy.copy would build another UNet, and drop it
    half.__dict__.update(unet.__dict__)
    rest = {"up_blocks": nn.ModuleList(), "conv_norm_out": None, "conv_out": nn.Identity()}
    half._modules = {**unet._modules, **rest}
    return half


class FakeScore:
    """What is trained beside the student: a critic, or of its UNet the adapters alone."""

    def __init__(self, critic: Critic, adapter: str | None) -> None:
        self.critic, self.adapter = critic, adapter
        self.unet = critic.unet
        self.live: nn.Module = critic

    def module(self) -> nn.Module:
        """UNet and head."""
        return self.critic

    def trainable(self) -> dict[str, nn.Parameter]:
        """The UNet's weights as `fake.NAME`, or its adapters by their own names; `head.NAME`."""
        unet, head = self.unet, self.critic.head
        if self.adapter is None:
            found = {f"fake.{name}": weight for name, weight in unet.named_parameters()}
        else:
            found = adapter_weights(unet, self.adapter)
        if head is not None:
            found |= {f"head.{name}": weight for name, weight in head.named_parameters()}
        return found


def adapter_weights(unet: Denoiser, adapter: str) -> dict[str, nn.Parameter]:
    """The weights of one of a UNet's adapters, by name."""
    return {
        name: weight
        for name, weight in unet.named_parameters()
        if ".lora_" in name and name.endswith(f".{adapter}.weight")
    }
