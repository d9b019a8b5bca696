"""The networks of a run: what the loop, the checkpoints and the exports need of any kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from shared.errors import UserError
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

    def begin_with(self, weights: Mapping[str, Tensor], name: str) -> None:
        """Take another student's weights, as its `exported` network has them, in fp32.

        Raises UserError, by the `name` of what they are, where they are of another shape.
        """
        take_weights(self.unet, weights, name)

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


GUIDANCE_INPUT = "time_embedding.cond_proj.weight"


def take_weights(unet: Denoiser, weights: Mapping[str, Tensor], name: str) -> None:
    """Give a UNet another's weights; a guidance input that the other has not stays as it is.

    Raises UserError, by the `name` of what they are, where they are of another shape.
    """
    wanted = {key: tensor.shape for key, tensor in unet.state_dict().items()}
    if GUIDANCE_INPUT in weights.keys() - wanted.keys():
        raise UserError(f"{name} is told its guidance, for which this objective has no input")
    if GUIDANCE_INPUT in weights and weights[GUIDANCE_INPUT].shape != wanted[GUIDANCE_INPUT]:
        width = weights[GUIDANCE_INPUT].shape[1]
        raise UserError(f"{name} wants --unet-time-cond-proj-dim {width}")
    missing = wanted.keys() - weights.keys() - {GUIDANCE_INPUT}
    odd = [key for key in weights if wanted.get(key) != weights[key].shape]
    if wrong := [*sorted(missing), *odd]:
        raise UserError(f"{name} is of another model: its {wrong[0]} differs from the teacher's")
    unet.load_state_dict({**unet.state_dict(), **weights})
