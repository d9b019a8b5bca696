"""A full student of a distillation: a UNet that is told the guidance, its average, a teacher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import guidance_embedding
from shared.models.fingerprint import signs
from shared.networks.denoiser import Denoiser, call_unet, cond_and_uncond
from shared.networks.precision import hold_frozen
from train.config import DistillConfig
from train.data.batch import Batch
from train.networks.ema import OffloadedAverage, move_average
from train.networks.student import GUIDANCE_INPUT, Student
from train.objectives import asks_teacher


class FullStudent(Student):
    """A UNet of its own that is told the guidance; its target is an exponential moving average.

    Where the cache has the teacher's answers, or none are wanted, no teacher is in memory.
    """

    def __init__(self, teacher: Denoiser, config: DistillConfig) -> None:
        torch.manual_seed(config.seed)  # of the guidance projection, where it starts at random
        self.teacher_signs = signs(teacher.parameters())
        self.dim, self.decay = config.unet_time_cond_proj_dim, config.ema_decay
        super().__init__(guided_copy(teacher, self.dim, config.guidance_init))
        self.target_unet = guided_copy(teacher, self.dim, "zero")
        self.target_unet.load_state_dict(self.unet.state_dict())
        self.unet.train().requires_grad_(True)
        self.teacher_unet: Denoiser | None = None
        if asks_teacher(config):  # else the weights have served: nothing more is asked
            hold_frozen(teacher, config.mixed_precision)
            self.teacher_unet = teacher
        self.average = None
        if config.offload_ema:
            self.average = OffloadedAverage(self.target_unet, config.mixed_precision)

    def networks(self) -> list[Denoiser]:
        """The student, its average and, where it is asked, the teacher."""
        teacher = [] if self.teacher_unet is None else [self.teacher_unet]
        return [self.unet, self.target_unet, *teacher]

    def origin(self) -> dict[str, str]:
        """A hash of the teacher's weights."""
        return {"teacher": self.teacher_signs}

    def begin_with(self, weights: Mapping[str, Tensor], name: str) -> None:
        """Let student and average begin with these."""
        super().begin_with(weights, name)
        self.target_unet.load_state_dict(self.unet.state_dict())
        if self.average is not None:
            self.average.take(self.unet.state_dict())

    def student(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Predict with gradients, at the guidance `batch.w`."""
        return self._guided(self.live, z, t, batch)

    @torch.no_grad()
    def target(self, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Predict as the average does, at the guidance `batch.w`."""
        return self._guided(self.target_unet, z, t, batch)

    @torch.no_grad()
    def teacher(
        self, z: Tensor, t: Tensor, batch: Batch, empty: TextEmbeds
    ) -> tuple[Tensor, Tensor]:
        """Predict with the captions and without."""
        assert self.teacher_unet is not None
        return cond_and_uncond(self.teacher_unet, z, t, batch.text, empty, batch.time_ids)

    def _guided(self, unet: nn.Module, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        embedding = guidance_embedding(batch.w, self.dim)
        return call_unet(unet, z, t, batch.text, batch.time_ids, embedding)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average towards the student by 1 - decay."""
        if self.average is not None:
            self.average.move(self.unet.state_dict(), self.decay)
        else:
            move_average(self.target_unet, self.unet, self.decay)

    def state(self) -> dict[str, Tensor]:
        """Student and average; the teacher is where it came from."""
        student = {f"student.{k}": v for k, v in self.unet.state_dict().items()}
        target = self.target_unet.state_dict() if self.average is None else self.average.weights
        return student | {f"target.{k}": v for k, v in target.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave, an average that is offloaded too."""
        super().load_state(state)
        if self.average is not None:
            self.average.show()

    def drawing(self) -> Denoiser:
        """The average, as it lies on the device."""
        return self.target_unet

    def exported(self) -> Denoiser:
        """The average in fp32."""
        return self.target_unet if self.average is None else self.average.network()


def fold_guidance(weights: Mapping[str, Tensor], w: float) -> dict[str, Tensor]:
    """A UNet's weights without a guidance input, as if it were always told `w`.

    The input adds cond_proj(embedding) in front of the first layer of the time embedding, which
    therefore can have the product in its bias.
    """
    folded = dict(weights)
    projection = folded.pop(GUIDANCE_INPUT)
    embedding = guidance_embedding(torch.tensor([w]), projection.shape[1])[0].to(projection)
    layer = GUIDANCE_INPUT.replace("cond_proj.weight", "linear_1")
    told = folded[f"{layer}.weight"] @ (projection @ embedding)
    folded[f"{layer}.bias"] = folded[f"{layer}.bias"] + told
    return folded


def plain_copy(unet: Denoiser, w: float) -> Denoiser:
    """A UNet without a guidance input that computes what this one does where it is told `w`."""
    config = {**unet.config, "time_cond_proj_dim": None}
    config.pop("_use_default_values", None)
    copy = Denoiser.from_config(config)
    copy.load_state_dict(fold_guidance(unet.state_dict(), w))
    return copy.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def guided_copy(teacher: Denoiser, dim: int, guidance_init: str) -> Denoiser:
    """The teacher's weights in a UNet with `time_cond_proj_dim`.

    With "zero" the new projection starts at zero, so the copy computes what the teacher computes;
    "random" is the paper's way.
    """
    config = {**teacher.config, "time_cond_proj_dim": dim}
    config.pop("_use_default_values", None)  # which would undo it where the teacher's is not set
    copy = Denoiser.from_config(config)
    missing, unexpected = copy.load_state_dict(teacher.state_dict(), strict=False)
    assert missing == [GUIDANCE_INPUT], missing
    assert not unexpected, unexpected
    if guidance_init == "zero":
        nn.init.zeros_(copy.time_embedding.cond_proj.weight)
    return copy.eval().requires_grad_(False).to(memory_format=torch.channels_last)
