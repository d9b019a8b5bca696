"""A LoRA student: one UNet, whose adapters are the student."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from shared.cache.conditioning import TextEmbeds
from shared.errors import UserError
from shared.models.fingerprint import signs
from shared.networks.denoiser import Denoiser, call_unet, cond_and_uncond, load_unet
from shared.networks.precision import hold_frozen
from train.config import DistillConfig
from train.data.batch import Batch
from train.networks.student import Student

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip

ADAPTER = "default"  # peft's name of the student's


class LoraStudent(Student):
    """One UNet in memory: the student and its own target with adapters, the teacher without."""

    def __init__(self, source: str, config: DistillConfig) -> None:
        super().__init__(load_unet(source))
        torch.manual_seed(config.seed)  # peft initialises lora_A at random, lora_B at zero
        add_adapters(self.unet, config)
        hold_frozen(self.unet, config.mixed_precision)
        self.unet.train()
        self.layers = [m for m in self.unet.modules() if isinstance(m, BaseTunerLayer)]

    def origin(self) -> dict[str, str]:
        """A hash of the teacher's weights."""
        return {"teacher": signs(p for p in self.unet.parameters() if not p.requires_grad)}

    def begin_with(self, weights: Mapping[str, Tensor], name: str) -> None:
        """Take a LoRA's weights. Raises UserError, by the LoRA's `name`, where it does not fit."""
        take_lora(self.unet, weights, name)

    @torch.no_grad()
    def target(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Predict as the student does, without gradients."""
        return call_unet(self.unet, z, t, batch.text, batch.time_ids)

    @torch.no_grad()
    def teacher(
        self, z: Tensor, t: Tensor, batch: Batch, empty: TextEmbeds
    ) -> tuple[Tensor, Tensor]:
        """Predict with the captions and without."""
        with self.adapters_off():
            return cond_and_uncond(self.unet, z, t, batch.text, empty, batch.time_ids)

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

    def state(self) -> dict[str, Tensor]:
        """The adapters alone; the teacher is where it came from."""
        return {name: p.detach() for name, p in self.trainable().items()}


@torch.no_grad()
def take_lora(unet: Denoiser, weights: Mapping[str, Tensor], name: str) -> None:
    """Give the student's adapters those of a LoRA, with alpha / rank in lora_B.

    `weights` are `LAYER.lora_A.weight` and `LAYER.lora_B.weight`. What is added to a layer is the
    same, whatever this student's alpha: a larger rank adds zeros, and a layer that the LoRA does
    not adapt begins as it would. Raises UserError, by the LoRA's `name`, where it does not fit.
    """
    layers = dict(unet.named_modules())
    rank = max(len(down) for key, down in weights.items() if key.endswith("lora_A.weight"))
    for path in dict.fromkeys(key.rpartition(".lora_")[0] for key in weights):
        layer = layers.get(path)
        if not isinstance(layer, LoraLayer):
            raise UserError(
                f"{name} adapts {path}, which this student does not; give "
                "--lora-target-modules with it, or another LoRA"
            )
        if rank > layer.r[ADAPTER]:
            raise UserError(f"{name} has rank {rank}; give --lora-rank {rank}, or more")
        down, up = (weights[f"{path}.{part}.weight"] for part in ("lora_A", "lora_B"))
        into_down: Any = layer.lora_A[ADAPTER].weight
        into_up: Any = layer.lora_B[ADAPTER].weight
        into_down, into_up = into_down[: len(down)], into_up[:, : len(down)]
        if (into_down.shape, into_up.shape) != (down.shape, up.shape):
            raise UserError(f"{name} is of another model: its {path} has other widths")
        into_down.copy_(down)
        into_up.copy_(up / layer.scaling[ADAPTER])


def add_adapters(unet: Denoiser, config: DistillConfig, name: str = ADAPTER) -> None:
    """LoRA on the layers that the flags name. Raises UserError for a name that fits none."""
    wanted: Sequence[str] = LORA_TARGETS
    if config.lora_target_modules is not None:
        wanted = [name.strip() for name in config.lora_target_modules.split(",")]
        for end in wanted:
            if not lora_targets(unet, (end,)):
                raise UserError(
                    f"--lora-target-modules: no layer's name ends in {end!r}; "
                    f"LCM's are {','.join(LORA_TARGETS)}"
                )
    alpha: Any = config.lora_alpha or config.lora_rank  # which peft takes for a whole number
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_targets(unet, wanted),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # other adapters: meant
        unet.add_adapter(settings, name)


def lora_targets(unet: Denoiser, wanted: Sequence[str] = LORA_TARGETS) -> list[str]:
    """Full names of the layers to adapt, so that nothing else matches by accident.

    A layer that has an adapter already keeps its name, though it lies within the adapter's.
    """
    layers = [
        name.removesuffix(".base_layer")
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    return [
        name
        for name in layers
        if any(name == target or name.endswith(f".{target}") for target in wanted)
    ]
