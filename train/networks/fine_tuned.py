"""The network of a full fine-tuning."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from train.config import DistillConfig
from train.data.batch import Batch
from train.networks.dtensor import restore
from train.networks.teacher import call_unet, load_unet


class FineTuned:
    """The teacher's own UNet, trained as it is: the only network in memory."""

    def __init__(self, source: str, config: DistillConfig) -> None:
        self.unet = load_unet(source).train().requires_grad_(True)
        self.live: nn.Module = self.unet

    def networks(self) -> list[UNet2DConditionModel]:  # noqa: D102
        return [self.unet]

    def student(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:  # noqa: D102
        return call_unet(self.live, z, t, batch.text, batch.time_ids)

    def trainable(self) -> dict[str, nn.Parameter]:  # noqa: D102
        return dict(self.unet.named_parameters())

    def after_step(self) -> None:
        """There is no target."""

    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return dict(self.unet.state_dict())

    def load_state(self, state: dict[str, Tensor]) -> None:  # noqa: D102
        for name, tensor in self.unet.state_dict().items():
            restore(tensor, state[name])

    def drawing(self) -> UNet2DConditionModel:  # noqa: D102
        return self.unet

    def exported(self) -> UNet2DConditionModel:  # noqa: D102
        return self.unet
