"""The memory estimate of `--objective dmd` against real networks and a real step."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.common.public_unets import SD15, SDXL
from shared.cache.conditioning import TextEmbeds
from shared.diffusion import schedule_from_config
from tests.support.students import two_of
from train.config import DistillConfig
from train.data.batch import Batch
from train.memory.estimate import Parallelism, estimate, meta_networks
from train.memory.meta import LiveBytes
from train.networks.build import build_student
from train.objectives.dmd import DMD
from train.state.optim import build_optimizer

SIZE, COUNT = (32, 32), 3
PAIRS = two_of(("full", "full"), ("lora", "lora"))


def config(model, kind: str, fake: str = "lora", **more) -> DistillConfig:
    return DistillConfig(
        str(model), None, None, objective="dmd", student=kind, fake=fake, lora_rank=8,
        train_batch_size=COUNT, **{"mixed_precision": "no", **more},
    )  # fmt: skip


def unet_config(model) -> dict:
    return json.loads((model / "unet" / "config.json").read_text())


def bytes_of(tensors) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("mixed", [pytest.param("no", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize(("kind", "fake"), PAIRS)
def test_weights_and_optimizers_are_those_of_the_run(tiny_sd, kind, fake, mixed):
    settings = config(tiny_sd, kind, fake, mixed_precision=mixed, gan_weight=0.1, fake_lora_rank=4)
    found = estimate(unet_config(tiny_sd), settings, (8, 8))
    student = build_student(str(tiny_sd), settings)
    modules = [*student.networks(), *student.heads()]
    assert found.weights == bytes_of(t for module in modules for t in module.state_dict().values())
    averages = 0
    for one in student.trained():
        trainable = one.trainable()
        optimizer = build_optimizer(settings, trainable)
        for parameter in trainable.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        kept = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
        averages += bytes_of(kept)
    assert found.optimizer == averages


def make_batch(unet, dmd: DMD) -> Batch:
    xl = unet.config.addition_embed_type == "text_time"
    latents = torch.randn(COUNT, 4, *SIZE)
    return Batch(
        latents=latents,
        prompt_embeds=torch.randn(COUNT, 77, unet.config.cross_attention_dim).half(),
        pooled_prompt_embeds=torch.randn(COUNT, 64).half() if xl else None,
        time_ids=torch.ones(COUNT, 6, dtype=torch.int32) if xl else None,
        noise=torch.randn_like(latents),
        index=torch.arange(COUNT) % dmd.intervals,
        w=torch.ones(COUNT),
        uniforms=torch.rand(COUNT, dmd.uniforms),
        noises=torch.randn(COUNT, dmd.noises, 4, *SIZE),
    )


def real_peak(model, settings: DistillConfig) -> int:
    """Both losses of a real step, and their backward passes: the most bytes alive, averages aside.

    Counted by the same counter, but of tensors that have numbers.
    """
    student = build_student(str(model), settings)
    schedule = schedule_from_config({"beta_schedule": "scaled_linear"})
    dmd = DMD(schedule, settings.num_student_steps, 10.0, settings.gan_weight)
    batch, live = make_batch(student.unet, dmd), LiveBytes()
    pooled = batch.pooled_prompt_embeds
    empty = TextEmbeds(batch.prompt_embeds[:1], None if pooled is None else pooled[:1])
    modules = [*student.networks(), *student.heads()]
    live.note([tensor for module in modules for tensor in module.state_dict().values()])
    live.note(list(batch.tensors().values()))
    for one, loss in ((student.partner, dmd.fake_loss), (student, dmd)):
        with live:
            loss(batch, empty, student).backward()
        for parameter in one.trainable().values():
            parameter.grad = None
    return live.peak


@pytest.mark.parametrize(
    ("model", "kind", "more"),
    [
        ("tiny_sd", "lora", {}),
        pytest.param("tiny_sd", "full", {"gan_weight": 0.1, "gradient_checkpointing": True},
                     marks=pytest.mark.slow),
        pytest.param("tiny_xl", "lora", {"gan_weight": 0.1, "num_student_steps": 4},
                     marks=pytest.mark.slow),
        pytest.param("tiny_xl", "full", {"fake": "full"}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_a_real_step(request, model, kind, more):
    model = request.getfixturevalue(model)
    settings = config(model, kind, **more)
    found = estimate(unet_config(model), settings, SIZE)
    assert found.peak - found.optimizer == pytest.approx(real_peak(model, settings), rel=0.1)


@pytest.mark.slow
def test_processes_and_micro_steps_take_what_they_hold_of_both(tiny_sd):
    unet, settings = unet_config(tiny_sd), config(tiny_sd, "lora")
    sizes = [sum(p.nbytes for p in part) for part in meta_networks(unet, settings).trained()]
    assert len(sizes) == 2

    def peak(parallelism: Parallelism, accumulation: int = 1) -> int:
        more = replace(settings, gradient_accumulation_steps=accumulation)
        return estimate(unet, more, SIZE, parallelism).peak

    alone = peak(Parallelism())
    assert peak(Parallelism(2)) - alone == pytest.approx(sum(sizes), rel=0.01)  # DDP's buckets
    assert max(sizes) * 0.9 < peak(Parallelism(), 2) - alone < max(sizes) * 1.1
    sharded = estimate(unet, settings, SIZE, Parallelism(4, fsdp=True))
    assert sharded.weights < 0.3 * estimate(unet, settings, SIZE).weights


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"gan_weight": 5e-3}, {"num_student_steps": 4}],
                         ids=["plain", "gan", "four-steps"])  # fmt: skip
@pytest.mark.parametrize(("unet", "size"), [(SD15, (64, 64)), (SDXL, (128, 128))],
                         ids=["sd15", "sdxl"])  # fmt: skip
def test_a_lora_step_takes_at_most_a_quarter_more_than_lcds(unet, size, more):
    base = {"train_batch_size": 2, "mixed_precision": "bf16"}
    lcd = estimate(unet, DistillConfig("", None, None, **base), size)
    dmd = estimate(unet, DistillConfig("", None, None, objective="dmd", **base, **more), size)
    print(f"lcd {lcd.peak / 1e9:.2f} GB, dmd {dmd.peak / 1e9:.2f} GB")
    assert dmd.peak <= 1.25 * lcd.peak
