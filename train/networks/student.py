"""The networks of a run: a full student with EMA target or without, or adapters on the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import guidance_embedding
from shared.errors import UserError
from train.config import DistillConfig
from train.data.batch import Batch
from train.networks.dtensor import local, restore
from train.networks.ema import OffloadedAverage
from train.networks.fine_tuned import FineTuned
from train.networks.precision import hold_frozen
from train.networks.teacher import call_unet, load_unet, twice
from train.objectives import OBJECTIVES

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


class Student(Protocol):
    """What the loop, the checkpoints and the exports need of any kind.

    An objective's own file says which further forwards it needs (see its `Networks`).
    """

    unet: UNet2DConditionModel
    live: nn.Module  # what the student's own forward goes through: `unet`, or DDP around it

    def networks(self) -> list[UNet2DConditionModel]:
        """Every UNet in memory; the last has the teacher's weights, where any are frozen."""

    def student(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """With gradients."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name, fp32."""

    def after_step(self) -> None:
        """Move the target after an optimizer step."""

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of the networks."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""

    def drawing(self) -> UNet2DConditionModel:
        """The network that previews are drawn with, on the device."""

    def exported(self) -> UNet2DConditionModel:
        """The network that people will draw with, fp32."""


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


def build_student(source: str, config: DistillConfig) -> Student:
    """The student that the flags ask for, on the CPU."""
    full = FullStudent if OBJECTIVES[config.objective].teacher else FineTuned
    kind = LoraStudent if config.student == "lora" else full
    student: Student = kind(source, config)
    if config.gradient_checkpointing:
        student.unet.enable_gradient_checkpointing()
    if config.use_8bit_adam:  # bitsandbytes goes through weights and averages as they lie in memory
        for parameter in student.trainable().values():
            parameter.data = parameter.data.contiguous()
    return student


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
