"""The memory of `--objective dmd` under FSDP against a step through fully_shard's own networks."""

import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import schedule_from_config
from train.config import DistillConfig
from train.data.batch import Batch
from train.memory.estimate import Parallelism, estimate
from train.networks.build import build_student
from train.networks.dtensor import local
from train.networks.fake import first_half
from train.objectives.dmd import DMD
from train.trainer.distributed import apply_fsdp

WORLD, COUNT = 4, 3


class Sizes(TorchDispatchMode):
    """The most bytes alive at a time, each storage at its size of the moment: FSDP empties some."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.note((args, result))
        return result

    def note(self, tensors) -> None:
        for tensor in tree_iter(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = local(tensor).untyped_storage()
                gone = lambda _, key=storage._cdata: self.storages.pop(key, None)  # noqa: E731
                self.storages.setdefault(storage._cdata, weakref.ref(storage, gone))
        alive = [found for one in list(self.storages.values()) if (found := one()) is not None]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive))


@pytest.fixture
def sharded(tiny_sd):
    """Build a student as the first of four processes holds it; the others only seem to be there."""

    def build(config: DistillConfig):
        student = build_student(str(tiny_sd), config)
        for module in (*student.networks(), *student.heads()):
            apply_fsdp(module.cpu(), FullyShardedDataParallelPlugin())
        return student

    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    yield build
    dist.destroy_process_group()


def settings(model: Path, student: str, fake: str, **more) -> DistillConfig:
    return DistillConfig(
        str(model), None, None, objective="dmd", student=student, fake=fake, lora_rank=8,
        train_batch_size=COUNT, mixed_precision="no", **more,
    )  # fmt: skip


def make_batch(dmd: DMD, width: int, size: tuple[int, int]) -> Batch:
    latents = torch.randn(COUNT, 4, *size)
    return Batch(
        latents=latents,
        prompt_embeds=torch.randn(COUNT, 77, width).half(),
        pooled_prompt_embeds=None,
        time_ids=None,
        noise=torch.randn_like(latents),
        index=torch.zeros(COUNT, dtype=torch.int64),
        w=torch.ones(COUNT),
        uniforms=torch.rand(COUNT, dmd.uniforms),
        noises=torch.randn(COUNT, dmd.noises, 4, *size),
    )


def step_peak(student, config: DistillConfig, size: tuple[int, int]) -> int:
    """Both losses of a step and their backward passes: the most bytes that a process has."""
    dmd = DMD(schedule_from_config({"beta_schedule": "scaled_linear"}), 1, 10.0, config.gan_weight)
    batch, sizes = make_batch(dmd, student.unet.config.cross_attention_dim, size), Sizes()
    modules = [*student.networks(), *student.heads()]
    sizes.note([tensor for module in modules for tensor in module.state_dict().values()])
    sizes.note(list(batch.tensors().values()))
    for one, loss in ((student.partner, dmd.fake_loss), (student, dmd)):
        with sizes:
            loss(batch, TextEmbeds(batch.prompt_embeds[:1], None), student).backward()
        for parameter in one.trainable().values():
            parameter.grad = None
    return sizes.peak


def peaks(model, sharded, config: DistillConfig, size: tuple[int, int]) -> tuple[int, int]:
    """What a step takes, and what the estimate says of it; AdamW's averages left aside."""
    unet = json.loads((model / "unet" / "config.json").read_text())
    found = estimate(unet, config, size, Parallelism(WORLD, fsdp=True))
    return step_peak(sharded(config), config, size), found.peak - found.optimizer


@pytest.mark.slow
@pytest.mark.parametrize("fake", ["lora", "full"])
def test_the_features_that_fsdp_keeps_are_counted(tiny_sd, sharded, fake):
    config = settings(tiny_sd, fake, fake, gan_weight=0.1)
    wanted, found = peaks(tiny_sd, sharded, config, (32, 32))
    assert found == pytest.approx(wanted, rel=0.05)


@pytest.mark.slow
def test_where_weights_are_most_of_it_the_estimate_is_on_the_safe_side(tiny_sd, sharded):
    """It adds the gradients that are whole to the peak of activations, which comes before them."""
    wanted, found = peaks(tiny_sd, sharded, settings(tiny_sd, "lora", "full"), (8, 8))
    assert wanted <= found <= 1.25 * wanted


def test_the_features_of_a_sharded_unet_are_had_without_another_unet(tiny_sd, sharded):
    """copy.copy of what fully_shard has made builds a UNet of diffusers' default size: 3.4 GB."""
    unet = sharded(settings(tiny_sd, "lora", "lora", gan_weight=0.1)).partner.unet
    sizes, state = Sizes(), torch.get_rng_state()
    with sizes:
        half = first_half(unet)
    assert sizes.peak == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert half.conv_in is unet.conv_in
    assert len(half.up_blocks) == 0 < len(unet.up_blocks)
