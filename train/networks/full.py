"""A full student: a UNet of its own that is told the guidance, and its average."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import guidance_embedding
from train.config import DistillConfig
from train.data.batch import Batch
from train.networks.dtensor import local, restore
from train.networks.ema import OffloadedAverage
from train.networks.precision import hold_frozen
from train.networks.teacher import call_unet, load_unet, twice


class FullStudent:
    """A UNet of its own that is told the guidance; its target is an exponential moving average."""

    def __init__(self, source: str, config: DistillConfig) -> None:
        torch.manual_seed(config.seed)  # of the guidance projection, where it starts at random
        self.teacher_unet = load_unet(source)
        self.dim, self.decay = config.unet_time_cond_proj_dim, config.ema_decay
        self.unet = guided_copy(self.teacher_unet, self.dim, config.guidance_init)
        self.target_unet = guided_copy(self.teacher_unet, self.dim, "zero")
        self.target_unet.load_state_dict(self.unet.state_dict())
        self.unet.train().requires_grad_(True)
        self.live: nn.Module = self.unet
        hold_frozen(self.teacher_unet, config.mixed_precision)
        self.average = None
        if config.offload_ema:
            self.average = OffloadedAverage(self.target_unet, config.mixed_precision)

    def networks(self) -> list[UNet2DConditionModel]:  # noqa: D102
        return [self.unet, self.target_unet, self.teacher_unet]

    def student(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:  # noqa: D102
        return self._told(self.live, z, t, batch)

    @torch.no_grad()
    def target(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:  # noqa: D102
        return self._told(self.target_unet, z, t, batch)

    @torch.no_grad()
    def teacher(  # noqa: D102
        self, z: Tensor, t: Tensor, batch: Batch, empty: TextEmbeds
    ) -> tuple[Tensor, Tensor]:
        return twice(self.teacher_unet, z, t, batch.text, empty, batch.time_ids)

    def _told(self, unet: nn.Module, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        embedding = guidance_embedding(batch.w, self.dim)
        return call_unet(unet, z, t, batch.text, batch.time_ids, embedding)

    def trainable(self) -> dict[str, nn.Parameter]:  # noqa: D102
        return dict(self.unet.named_parameters())

    @torch.no_grad()
    def after_step(self) -> None:  # noqa: D102
        if self.average is not None:
            self.average.move(self.unet.state_dict(), self.decay)
            return
        averages = [local(p) for p in self.target_unet.parameters()]
        weights = [local(p) for p in self.unet.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    def state(self) -> dict[str, Tensor]:  # noqa: D102
        student = {f"student.{k}": v for k, v in self.unet.state_dict().items()}
        target = self.target_unet.state_dict() if self.average is None else self.average.weights
        return student | {f"target.{k}": v for k, v in target.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:  # noqa: D102
        for name, tensor in self.unet.state_dict().items():
            restore(tensor, state[f"student.{name}"])
        if self.average is not None:
            self.average.load({name: state[f"target.{name}"] for name in self.average.weights})
            return
        for name, tensor in self.target_unet.state_dict().items():
            restore(tensor, state[f"target.{name}"])

    def drawing(self) -> UNet2DConditionModel:  # noqa: D102
        return self.target_unet

    def exported(self) -> UNet2DConditionModel:  # noqa: D102
        return self.target_unet if self.average is None else self.average.network()


def guided_copy(
    teacher: UNet2DConditionModel, dim: int, guidance_init: str
) -> UNet2DConditionModel:
    """The teacher's weights in a UNet with `time_cond_proj_dim`.

    With "zero" the new projection starts at zero, so the copy computes what the teacher computes;
    "random" is the paper's way.
    """
    config = {**teacher.config, "time_cond_proj_dim": dim}
    config.pop("_use_default_values", None)  # which would undo it where the teacher's is not set
    copy = UNet2DConditionModel.from_config(config)
    missing, unexpected = copy.load_state_dict(teacher.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"], missing
    assert not unexpected, unexpected
    if guidance_init == "zero":
        nn.init.zeros_(copy.time_embedding.cond_proj.weight)
    return copy.eval().requires_grad_(False).to(memory_format=torch.channels_last)
