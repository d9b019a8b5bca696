"""The networks of a run: what the loop, the checkpoints and the exports need of any kind."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from shared.models.fingerprint import signs
from shared.networks.denoiser import Denoiser, call_unet
from train.data.batch import Batch
from train.networks.dtensor import restore


class Trained(Protocol):
    """Weights that are trained together."""

    unet: Denoiser
    live: nn.Module  # what a forward with gradients goes through; DDP wraps it

    def module(self) -> nn.Module:
        """What `live` is, or wraps."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """What an optimizer moves, by name, fp32."""


class Student:
    """A UNet that is trained, and nothing beside it.

    Kinds that have a target and a teacher have forwards of these names too: an objective's own file
    says what it asks for (its `Networks`).
    """

    partner: Trained | None = None  # what is trained beside it, where an objective has such

    def __init__(self, unet: Denoiser) -> None:
        self.unet = unet
        self.live: nn.Module = unet  # what the student's own forward goes through; DDP wraps it

    def module(self) -> nn.Module:
        """The UNet."""
        unet: nn.Module = self.unet
        return unet

    def trained(self) -> list[Trained]:
        """List what is trained, itself first."""
        return [self] if self.partner is None else [self, self.partner]

    def networks(self) -> list[Denoiser]:
        """List every UNet in memory."""
        return [self.unet]

    def student(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Predict eps or v `[B, C, h, w]`, with gradients."""
        return call_unet(self.live, z, t, batch.text, batch.time_ids)

    def heads(self) -> list[nn.Module]:
        """List what is in memory besides."""
        return []

    def origin(self) -> dict[str, str]:
        """A hash of the weights that the run began with, by what they are to it."""
        return {"model": signs(self.unet.parameters())}

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name, fp32."""
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    def after_step(self) -> None:
        """Follow an optimizer step, where something has to."""

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of the networks."""
        return dict(self.unet.state_dict())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, tensor in self.state().items():
            restore(tensor, state[name])

    def drawing(self) -> Denoiser:
        """The network that previews are drawn with, on the device."""
        return self.unet

    def exported(self) -> Denoiser:
        """The network that people will draw with, fp32."""
        return self.unet
