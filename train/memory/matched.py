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
from train.memory.batch import META, meta_batch
from train.networks.matched import MatchedStudent
from train.objectives import objective_of

STEPS = 1000  # of the noise; how many changes nothing


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
    """The partner's loss and the student's, of a batch of the run's size."""
    objective = objective_of(config)
    assert objective.partner is not None
    loss = objective.build(config, Schedule(torch.empty(STEPS, device=META), "epsilon"), None)
    batch = meta_batch(unet_config, latent_size, config.train_batch_size, loss)
    return [
        partial(one, batch, batch.text, networks) for one in (objective.partner.loss(loss), loss)
    ]
