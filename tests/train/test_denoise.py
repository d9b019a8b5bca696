"""`--objective denoise`: the loss by its formula, its draws, and what it learns."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file
from torch import nn

from shared.cache.conditioning import TextEmbeds
from shared.cache.draws import DrawSpec
from shared.diffusion import schedule_from_config
from shared.errors import UserError
from tests.support.draws import draw
from train.config import DistillConfig
from train.data.loader import Batch, Loader
from train.networks.build import build_student
from train.objectives import denoise
from train.objectives.denoise import Denoise
from train.state import checkpoint
from train.trainer.loop import distill
from train.trainer.setup import prepare

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {**SD, "rescale_betas_zero_snr": True}
SHAPE = (4, 8, 8)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def settings(tiny_cache, tiny_sd, tmp_path):
    """The flags of a small run; `settings(seed=1)` changes some."""

    def make(run: str = "run", **more) -> DistillConfig:
        flags = {
            "model": str(tiny_sd), "cache": tiny_cache, "run": tmp_path / run, "threads": 1,
            "objective": "denoise", "train_batch_size": 4, "max_train_steps": 4,
            "checkpointing_steps": 2, "lora_rank": 4, "logging_steps": 1, "validation_steps": 0,
            "learning_rate": 1e-3,
        }  # fmt: skip
        return DistillConfig(**flags | more)

    return make


class Affine(nn.Module):
    """Stands for a UNet; notes what it was asked."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def student(self, z, t, batch):
        self.z, self.t = z, t
        return self.scale * z + 0.1 * t.view(-1, 1, 1, 1) / 1000


def some_batch(t: list[int]) -> Batch:
    rng = torch.Generator().manual_seed(3)
    latents, noise = torch.randn(2, len(t), *SHAPE, generator=rng, dtype=torch.float64)
    text = torch.zeros(len(t), 1, 1)
    return Batch(latents, text, None, None, noise, torch.tensor(t), torch.zeros(len(t)))


def float64_loss(scheduler_config: dict, gamma: float | None) -> Denoise:
    return Denoise(schedule_from_config(scheduler_config).to("cpu", torch.float64), gamma)


EMPTY = TextEmbeds(torch.zeros(1, 1, 1), None)


# ---- The loss.


@pytest.mark.parametrize("gamma", [None, 5.0, 0.3])
@pytest.mark.parametrize(
    ("config", "prediction_type"),
    [(SD, "epsilon"), (SD, "v_prediction"), (ZERO_SNR, "v_prediction")],
    ids=["epsilon", "v", "v-zero-snr"],
)
def test_the_loss_is_that_of_diffusers_script(config, prediction_type, gamma):
    """train_text_to_image.py's lines, with diffusers' own scheduler and compute_snr."""
    config = {**config, "prediction_type": prediction_type}
    t = [0, 17, 400, 730, 998] if prediction_type == "epsilon" else [0, 17, 400, 730, 999]
    batch, unet = some_batch(t), Affine()
    loss = float64_loss(config, gamma)(batch, EMPTY, unet)
    loss.backward()

    scheduler = DDPMScheduler(**config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    stock = Affine()
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.index)
    predicted = stock.student(noisy, batch.index, batch)
    target = batch.noise
    if prediction_type == "v_prediction":
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.index)
    errors = ((predicted - target) ** 2).mean((1, 2, 3))
    if gamma is not None:
        snr = compute_snr(scheduler, batch.index)
        weights = torch.stack([snr, torch.full_like(snr, gamma)], dim=1).min(dim=1)[0]
        errors *= weights / (snr if prediction_type == "epsilon" else snr + 1)
    wanted = errors.mean()
    wanted.backward()
    torch.testing.assert_close(unet.z, noisy, rtol=1e-5, atol=1e-6)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert unet.scale.grad.item() == pytest.approx(stock.scale.grad.item(), rel=1e-5)


def test_zero_terminal_snr_does_not_trouble_the_weights():
    config = DistillConfig("some-model", cache=None, run=None, objective="denoise", snr_gamma=5.0)
    schedule = schedule_from_config({**ZERO_SNR, "prediction_type": "v_prediction"})
    weights = denoise.build(config, schedule).weights(torch.tensor([999, 998]))
    assert weights.isfinite().all()


SPEC = DrawSpec(seed=1, views=1, num_ddim_timesteps=1000, w_min=0, w_max=0,
                proportion_empty_prompts=0, latent_noise=True)  # fmt: skip


# ---- The draws.


def test_noise_offset_shifts_each_channel_by_a_normal_number():
    offset, shifts = 0.25, []
    for position in range(800):
        plain = draw(SPEC, position, 1, SHAPE)
        shifted = draw(replace(SPEC, noise_offset=offset), position, 1, SHAPE)
        assert (plain.index, plain.view) == (shifted.index, shifted.view)
        assert np.array_equal(plain.latent_noise, shifted.latent_noise)
        difference = shifted.noise - plain.noise
        shift = difference.mean((1, 2))
        assert np.abs(difference - shift[:, None, None]).max() < 1e-5
        shifts.append(shift / offset)
    shifts = np.stack(shifts)
    assert np.abs(shifts.mean(0)).max() < 5 / np.sqrt(800)
    assert shifts.std(0) == pytest.approx(np.ones(4), abs=0.12)
    assert np.abs(np.corrcoef(shifts.T) - np.eye(4)).max() < 5 / np.sqrt(800)


def test_timesteps_come_uniformly_from_the_whole_schedule(settings):
    run = prepare(settings(train_batch_size=600, noise_offset=0.1, dry_run=True))
    batches = run.loader.batches()
    batch = next(batches)
    t = np.sort(batch.index.numpy())
    batches.close()
    assert (t.min() < 20, t.max() > 979) == (True, True)
    assert np.abs(t / 1000 - np.arange(600) / 600).max() < 0.08  # Kolmogorov and Smirnov
    assert batch.noise.mean((2, 3)).std() == pytest.approx((0.1**2 + 1 / 64) ** 0.5, rel=0.1)


def few_pictures(run):
    """The run with the first four pictures of its cache alone."""
    run.loader.order = replace(run.loader.order, sizes=(4,))
    return run


def fixed_loss(run) -> float:
    """Over its pictures, with 64 timesteps and noises that training does not draw."""
    loader = run.loader
    order, spec = replace(loader.order, batch_size=64), replace(loader.spec, seed=12345)
    probe = Loader(loader.buckets, order, spec, loader.latents, loader.unconditional).batches()
    with torch.no_grad():
        loss = float(run.objective(next(probe), run.empty, run.student))
    probe.close()
    return loss


# ---- Training.


@pytest.mark.parametrize(
    ("kind", "rate"), [("lora", 2e-3), pytest.param("full", 3e-4, marks=pytest.mark.slow)]
)
def test_training_lowers_the_loss(settings, kind, rate):
    run = few_pictures(prepare(settings(
        student=kind, train_batch_size=8, max_train_steps=20, learning_rate=rate, lora_rank=8,
    )))  # fmt: skip
    before = fixed_loss(run)
    distill(run)
    assert fixed_loss(run) < 0.9 * before


def test_a_full_student_is_the_only_network(tiny_sd, settings):
    student = build_student(str(tiny_sd), settings(student="full"))
    networks = {value for value in vars(student).values() if isinstance(value, nn.Module)}
    assert networks == {student.unet}
    assert student.exported() is student.unet
    stock = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
    assert set(student.trainable()) == set(dict(stock.named_parameters()))
    assert set(student.state()) == set(stock.state_dict())
    assert {p.dtype for p in student.trainable().values()} == {torch.float32}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.whole_checkpoints(run)[-1]
    files = [*folder.glob("*.safetensors"), *run.glob("*.safetensors"), *run.glob("unet/*.safe*")]
    return {f"{f.name}/{n}": v for f in files for n, v in load_file(f).items()}


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "full"])
def test_a_resumed_run_is_the_uninterrupted_one(settings, kind):
    rough = {"student": kind, "noise_offset": 0.1, "snr_gamma": 5.0,
             "proportion_empty_prompts": 0.2, "lr_warmup_steps": 3}  # fmt: skip
    if kind == "lora":
        rough["lora_dropout"] = 0.3
    distill(prepare(settings("whole", **rough)))
    distill(prepare(settings("halves", max_train_steps=2, **rough)))
    halves = settings("halves", resume_from_checkpoint="latest", **rough)
    distill(prepare(halves))
    first, second = tensors(settings("whole").run), tensors(halves.run)
    assert len(first) > 100
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for change in ({"snr_gamma": 4.0}, {"noise_offset": 0.2}, {"objective": "lcd"}):
        changed = {"noise_offset": 0.0, "snr_gamma": None} if "objective" in change else {}
        with pytest.raises(UserError, match=rf"another run: .*{next(iter(change))} is"):
            prepare(replace(halves, **changed, **change))
