"""The exponential moving average of a full student, on the device or off it (`--offload-ema`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shared.networks.denoiser import Denoiser
from shared.networks.precision import hold_frozen
from train.networks.dtensor import local


@torch.no_grad()
def move_average(average: nn.Module, live: nn.Module, decay: float) -> None:
    """Move `average`'s weights, which may be sharded as `live`'s are, towards them by 1 - decay."""
    averages = [local(parameter) for parameter in average.parameters()]
    weights = [local(parameter) for parameter in live.parameters()]
    torch._foreach_lerp_(averages, weights, 1 - decay)


class OffloadedAverage:
    """fp32 averages on the CPU; `unet`, on the device, holds them in half precision.

    In half precision alone an average would stand still: (1 - decay) of a small step is lost in
    rounding. The price is a copy of the weights each way per optimizer step.
    """

    def __init__(self, unet: Denoiser, mixed_precision: str | None) -> None:
        self.unet = unet
        self.weights = {k: v.detach().float().cpu().clone() for k, v in unet.state_dict().items()}
        hold_frozen(unet, mixed_precision)

    @torch.no_grad()
    def move(self, live: Mapping[str, Tensor], decay: float) -> None:
        """Towards the live weights by 1 - decay."""
        for name, average in self.weights.items():
            average.lerp_(live[name].cpu(), 1 - decay)
        self.show()

    @torch.no_grad()
    def take(self, live: Mapping[str, Tensor]) -> None:
        """Become the live weights."""
        for name, average in self.weights.items():
            average.copy_(live[name])
        self.show()

    @torch.no_grad()
    def show(self) -> None:
        """Round the averages into `unet`."""
        for name, held in self.unet.state_dict().items():
            held.copy_(self.weights[name])

    def network(self) -> Denoiser:
        """The average as a network of its own, fp32 on the CPU."""
        network = Denoiser.from_config(self.unet.config)
        network.load_state_dict(self.weights)
        return network.eval().requires_grad_(False)
