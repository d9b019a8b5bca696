"""Students of the tiny teachers, and batches for them."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import schedule_from_config
from train.config import DistillConfig
from train.data.batch import Batch
from train.networks.build import build_student
from train.objectives.lcd import LCD

CPU = torch.device("cpu")
MODELS = ["tiny_sd", "tiny_xl"]
KINDS = ["full", "lora"]


def two_of(one: tuple, other: tuple) -> list:
    """Both pairs of parameters, and, slow, what is mixed of the two."""
    mixed = [(one[0], other[1]), (other[0], one[1])]
    return [one, other, *(pytest.param(*case, marks=pytest.mark.slow) for case in mixed)]


def build(model, kind: str, **more):
    more = {"lora_rank": 4, "unet_time_cond_proj_dim": 16} | more
    config = DistillConfig(str(model), cache=None, run=None, student=kind, **more)
    return build_student(str(model), config)


def stock_unet(model) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32).eval()


def make_batch(unet, count: int = 3, seed: int = 0) -> tuple[Batch, TextEmbeds]:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    xl = unet.config.addition_embed_type == "text_time"
    width = unet.config.cross_attention_dim
    ids = torch.tensor([[70, 64, 3, 0, 64, 64]], dtype=torch.int32)
    batch = Batch(
        latents=normal(count, 4, 8, 8),
        prompt_embeds=normal(count, 16, width).half(),
        pooled_prompt_embeds=normal(count, 64).half() if xl else None,
        time_ids=ids.repeat(count, 1) if xl else None,
        noise=normal(count, 4, 8, 8),
        index=torch.tensor([49, 20, 0])[:count],
        w=torch.tensor([1.0, 3.0, 5.0])[:count],
    )
    return batch, TextEmbeds(torch.zeros(1, 16, width).half(), torch.zeros(1, 64) if xl else None)


def disturb(parameters, seed: int = 1, scale: float = 0.2) -> None:
    """As if trained."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn(parameter.shape, generator=rng)


def lcd_for(model, student) -> tuple[LCD, Batch, TextEmbeds]:
    schedule = schedule_from_config(DDIMScheduler.load_config(model / "scheduler"))
    return LCD(schedule, 50, 10.0, "huber", 1e-3), *make_batch(student.unet)
