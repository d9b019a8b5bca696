"""The networks of distribution matching: student, teacher and fake score, in one to three UNets."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from shared.cache.conditioning import TextEmbeds
from shared.models.fingerprint import signs
from shared.networks.denoiser import Denoiser, call_unet, cond_and_uncond
from shared.networks.precision import hold_frozen
from train.config import DistillConfig
from train.data.batch import Batch
from train.networks.fake import Critic, FakeScore, Head, adapter_weights
from train.networks.full import fold_guidance
from train.networks.lora import ADAPTER, add_adapters, take_lora
from train.networks.student import GUIDANCE_INPUT, Student

FAKE = "fake"  # the adapters of the fake score


class MatchedStudent(Student):
    """A student, its teacher, and the fake score of what the student draws.

    A LoRA student and a fake score of adapters share the teacher's UNet, with the adapters of one
    of them switched on, or none. Each forward leaves them as it needs them: with gradient
    checkpointing the backward pass computes its activations again.
    """

    partner: FakeScore

    def __init__(self, teacher: Denoiser, config: DistillConfig, w: float = 0.0) -> None:
        """`w` is the guidance of a student that it may begin with and that is told its guidance."""
        self.w = w
        self.lora = config.student == "lora"
        student = teacher if self.lora else trained_copy(teacher)
        fake = teacher if config.fake == "lora" else trained_copy(teacher)
        super().__init__(student)
        self.teacher_unet = teacher
        torch.manual_seed(config.seed)  # of the adapters, as in `LoraStudent`, and then the head
        if self.lora:
            add_adapters(teacher, config)
        if fake is teacher:
            add_adapters(teacher, fake_adapters(config), FAKE)
        for name in (ADAPTER, FAKE):
            for weight in adapter_weights(teacher, name).values():
                weight.requires_grad_(True)  # peft trains the last alone
        hold_frozen(teacher, config.mixed_precision)
        head = Head(teacher.config.block_out_channels[-1]) if config.gan_weight else None
        self.partner = FakeScore(Critic(fake, head), FAKE if fake is teacher else None)
        self.layers = [m for m in teacher.modules() if isinstance(m, BaseTunerLayer)]
        for one in self.trained():
            one.unet.train()

    def networks(self) -> list[Denoiser]:
        """Each once."""
        return list(dict.fromkeys([self.unet, self.teacher_unet, self.partner.unet]))

    def heads(self) -> list[nn.Module]:
        """That of the GAN term, where there is one."""
        head = self.partner.critic.head
        return [] if head is None else [head]

    def origin(self) -> dict[str, str]:
        """A hash of the teacher's weights."""
        frozen = (weight for weight in self.teacher_unet.parameters() if not weight.requires_grad)
        return {"teacher": signs(frozen)}

    def trainable(self) -> dict[str, nn.Parameter]:
        """The student's own, by the names that other objectives give them."""
        if self.lora:
            return adapter_weights(self.unet, ADAPTER)
        return dict(self.unet.named_parameters())

    def use(self, adapter: str | None) -> None:
        """Switch an adapter of the teacher's UNet on and all others off; gradients stay wanted."""
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            layer._active_adapter = [adapter or ADAPTER]

    def student(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Predict with gradients."""
        self.use(ADAPTER)
        torch.clear_autocast_cache()  # older torch keeps weights there that `target` has cast
        return super().student(z, t, batch)

    @torch.no_grad()
    def target(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Predict as the student does, without gradients."""
        self.use(ADAPTER)
        return call_unet(self.unet, z, t, batch.text, batch.time_ids)

    @torch.no_grad()
    def teacher(
        self, z: Tensor, t: Tensor, batch: Batch, empty: TextEmbeds
    ) -> tuple[Tensor, Tensor]:
        """Predict with the captions and without."""
        self.use(None)
        return cond_and_uncond(self.teacher_unet, z, t, batch.text, empty, batch.time_ids)

    def fake(self, z: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Its prediction without gradients; with a head its logits of z, for their slope."""
        self.use(FAKE)
        return self.partner.critic.judge(z, t, batch.text, batch.time_ids)

    def learning_fake(
        self, z: Tensor, t: Tensor, batch: Batch, *real: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The same with gradients for it; the logits of `real` latents follow those of z."""
        self.use(FAKE)
        said: tuple[Tensor, Tensor | None] = self.partner.live(
            z, t, batch.text, batch.time_ids, *real
        )
        return said

    def begin_with(self, weights: Mapping[str, Tensor], name: str) -> None:
        """Let the student begin with these; the fake score still begins as the teacher."""
        if self.lora:
            take_lora(self.unet, weights, name)
        elif GUIDANCE_INPUT in weights:
            super().begin_with(fold_guidance(weights, self.w), name)
        else:
            super().begin_with(weights, name)

    def state(self) -> dict[str, Tensor]:
        """The student and the fake score; the teacher is where it came from."""
        weights = self.trainable() | self.partner.trainable()
        return {name: weight.detach() for name, weight in weights.items()}

    def drawing(self) -> Denoiser:
        """The student as it stands."""
        self.use(ADAPTER)
        return self.unet

    def exported(self) -> Denoiser:
        """The same; an export leaves the fake score's adapters out."""
        return self.drawing()


def trained_copy(unet: Denoiser) -> Denoiser:
    """A UNet of its own that is trained."""
    return copy.deepcopy(unet).requires_grad_(True)


def fake_adapters(config: DistillConfig) -> DistillConfig:
    """The flags of the fake score's adapters: the student's, but for rank and dropout."""
    rank = config.fake_lora_rank or config.lora_rank
    alpha = config.lora_alpha if config.fake_lora_rank is None else None
    return replace(config, lora_rank=rank, lora_alpha=alpha, lora_dropout=0.0)
