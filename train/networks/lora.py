"""A LoRA student: one UNet, whose adapters are the student and without them the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from shared.cache.conditioning import TextEmbeds
from shared.errors import UserError
from train.config import DistillConfig
from train.data.batch import Batch
from train.networks.dtensor import restore
from train.networks.precision import hold_frozen
from train.networks.teacher import call_unet, load_unet, twice

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


class LoraStudent:
    """One UNet in memory: the student is it with adapters, the teacher without."""

    def __init__(self, source: str, config: DistillConfig) -> None:
        self.unet = load_unet(source)
        torch.manual_seed(config.seed)  # peft initialises lora_A at random, lora_B at zero
        add_adapters(self.unet, config)
        hold_frozen(self.unet, config.mixed_precision)
        self.unet.train()
        self.live: nn.Module = self.unet
        self.layers = [m for m in self.unet.modules() if isinstance(m, BaseTunerLayer)]

    def networks(self) -> list[UNet2DConditionModel]:  # noqa: D102
        return [self.unet]

    def student(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:  # noqa: D102
        return call_unet(self.live, z, t, batch.text, batch.time_ids)

    @torch.no_grad()
    def target(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:  # noqa: D102
        return call_unet(self.unet, z, t, batch.text, batch.time_ids)

    @torch.no_grad()
    def teacher(  # noqa: D102
        self, z: Tensor, t: Tensor, batch: Batch, empty: TextEmbeds
    ) -> tuple[Tensor, Tensor]:
        with self.adapters_off():
            return twice(self.unet, z, t, batch.text, empty, batch.time_ids)

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The bare teacher. peft's own switch would also turn off the adapters' requires_grad."""
        for layer in self.layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer._disable_adapters = False

    def trainable(self) -> dict[str, nn.Parameter]:  # noqa: D102
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    def after_step(self) -> None:
        """The target is the student itself."""

    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {name: p.detach() for name, p in self.trainable().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:  # noqa: D102
        for name, parameter in self.trainable().items():
            restore(parameter, state[name])

    def drawing(self) -> UNet2DConditionModel:  # noqa: D102
        return self.unet

    def exported(self) -> UNet2DConditionModel:  # noqa: D102
        return self.unet


def add_adapters(unet: UNet2DConditionModel, config: DistillConfig) -> None:
    """LoRA on the layers that the flags name. Raises UserError for a name that fits none."""
    wanted = LORA_TARGETS
    if config.lora_target_modules is not None:
        wanted = tuple(name.strip() for name in config.lora_target_modules.split(","))
        for name in wanted:
            if not lora_targets(unet, (name,)):
                raise UserError(
                    f"--lora-target-modules: no layer's name ends in {name!r}; "
                    f"LCM's are {','.join(LORA_TARGETS)}"
                )
    unet.add_adapter(
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_rank if config.lora_alpha is None else config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=lora_targets(unet, wanted),
        )
    )


def lora_targets(unet: UNet2DConditionModel, wanted: Sequence[str] = LORA_TARGETS) -> list[str]:
    """Full names of the layers to adapt, so that nothing else matches by accident."""
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and any(name == target or name.endswith(f".{target}") for target in wanted)
    ]
