"""Distribution matching on torch's meta device: its own losses by networks without numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import Schedule
from shared.networks.denoiser import Denoiser, call_unet
from train.config import DistillConfig
from train.data.batch import Batch
from train.networks.matched import MatchedStudent
from train.objectives.dmd import DMD

TOKENS = 77
META = torch.device("meta")


class MetaMatched(MatchedStudent):
    """`MatchedStudent` without numbers, in front of which torch.autocast cannot be called."""

    @torch.no_grad()
    def teacher(
        self, z: Tensor, t: Tensor, batch: Batch, empty: TextEmbeds
    ) -> tuple[Tensor, Tensor]:
        """Predict twice as much in one forward."""
        self.use(None)
        twice = {name: torch.cat([one, one]) for name, one in batch.tensors().items()}
        text = TextEmbeds(twice["prompt_embeds"], twice.get("pooled_prompt_embeds"))
        both = (torch.cat([z, z]), torch.cat([t, t]), text, twice.get("time_ids"))
        cond, uncond = call_unet(self.teacher_unet, *both).chunk(2)
        return cond, uncond


def meta_matched(teacher: Denoiser, config: DistillConfig) -> MetaMatched:
    """The networks around a teacher that lies on the meta device."""
    with META:
        return MetaMatched(teacher, config)


def matched_losses(
    networks: MatchedStudent,
    config: DistillConfig,
    unet_config: Mapping[str, Any],
    latent_size: tuple[int, int],
) -> list[Callable[[], Tensor]]:
    """The fake score's loss and the student's, of a batch of the run's size."""
    schedule = Schedule(torch.empty(1000, device=META), "epsilon")
    dmd = DMD(schedule, config.num_student_steps, 10.0, config.gan_weight)
    batch = meta_batch(unet_config, latent_size, config.train_batch_size, dmd)
    return [partial(loss, batch, batch.text, networks) for loss in (dmd.fake_loss, dmd)]


def meta_batch(
    unet_config: Mapping[str, Any], latent_size: tuple[int, int], count: int, dmd: DMD
) -> Batch:
    """A batch of so many samples for a UNet with this configuration."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, *shape, dtype=dtype, device=META)

    latents = (unet_config["in_channels"], *latent_size)
    pooled = ids = None
    if unet_config.get("addition_embed_type") == "text_time":
        sinusoids = 6 * unet_config["addition_time_embed_dim"]
        width = unet_config["projection_class_embeddings_input_dim"] - sinusoids
        pooled, ids = empty(width, dtype=torch.float16), empty(6, dtype=torch.int32)
    return Batch(
        latents=empty(*latents),
        prompt_embeds=empty(TOKENS, unet_config["cross_attention_dim"], dtype=torch.float16),
        pooled_prompt_embeds=pooled,
        time_ids=ids,
        noise=empty(*latents),
        index=empty(dtype=torch.int64),
        w=empty(),
        uniforms=empty(dmd.uniforms),
        noises=empty(dmd.noises, *latents),
    )
