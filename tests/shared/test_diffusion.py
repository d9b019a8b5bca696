"""The formulas of shared.diffusion against diffusers' own schedulers and pipelines."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler

from shared.diffusion import (
    Schedule,
    add_noise,
    boundary_scalings,
    consistency,
    ddim_step,
    guidance_embedding,
    guided,
    huber_distance,
    l2_distance,
    predicted_eps,
    predicted_x0,
    rescale_zero_terminal_snr,
    schedule_from_config,
    solver_timesteps,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAINED = {"trained_betas": np.linspace(1e-4, 0.03, 700).tolist(), "num_train_timesteps": 700}
SCHEDULES = {
    "scaled_linear": SD,
    "linear": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "500 steps": {**SD, "num_train_timesteps": 500},
    "trained_betas": TRAINED,
    "zero terminal SNR": {**SD, "rescale_betas_zero_snr": True},
    "defaults": {},
}


def tensors(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 4, 3, 6, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_that_of_diffusers(name):
    config = SCHEDULES[name]
    schedule = schedule_from_config({**config, "prediction_type": "v_prediction"})
    wanted = DDIMScheduler(**config).alphas_cumprod
    assert schedule.num_train_timesteps == len(wanted)
    torch.testing.assert_close(schedule.alphas_cumprod, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_xl"])
def test_schedule_of_a_model_folder(model, request):
    folder = request.getfixturevalue(model)
    config = DDIMScheduler.load_config(folder / "scheduler")
    schedule = schedule_from_config(config)
    stock = DDIMScheduler.from_pretrained(folder / "scheduler")
    torch.testing.assert_close(schedule.alphas_cumprod, stock.alphas_cumprod)
    assert schedule.prediction_type == stock.config.prediction_type


def test_alpha_and_sigma_are_a_rotation_and_exact_at_small_t():
    schedule = schedule_from_config(SD)
    t = torch.tensor([0, 19, 499, 999])
    alpha, sigma = schedule.alpha_sigma(t)
    betas = np.linspace(SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)[t.numpy()]
    np.testing.assert_allclose(alpha, np.sqrt(abar), rtol=1e-5)
    # Formed in bf16 this is wrong by almost 5% at t = 0.
    np.testing.assert_allclose(sigma, np.sqrt(1 - abar), rtol=1e-4)


def test_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="squaredcos_cap_v2"):
        schedule_from_config({"beta_schedule": "squaredcos_cap_v2"})
    with pytest.raises(ValueError, match="sample"):
        schedule_from_config({"prediction_type": "sample"})


def test_zero_terminal_snr_ends_in_pure_noise():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    assert abar[-1] == 0
    assert abar[0] == pytest.approx(1 - 0.00085, abs=1e-6)  # the start stays
    assert (abar[1:] < abar[:-1]).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [50, 20])
def test_conversions_and_step_are_those_of_ddim(prediction_type, steps):
    stock = DDIMScheduler(
        **SD, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    stock.set_timesteps(steps)
    schedule = schedule_from_config({**SD, "prediction_type": prediction_type})
    z, output = tensors(2)
    for index in (0, 1, steps // 2, steps - 1):
        batch = torch.full((5,), index)
        start, end = solver_timesteps(batch, steps, 1000)
        alpha, sigma = schedule.alpha_sigma(start)
        x0 = predicted_x0(output, z, alpha, sigma, prediction_type)
        eps = predicted_eps(output, z, alpha, sigma, prediction_type)
        wanted = stock.step(output, int(start[0]), z)
        torch.testing.assert_close(x0, wanted.pred_original_sample, rtol=1e-4, atol=1e-4)
        mine = ddim_step(x0, eps, *schedule.alpha_sigma(end))
        torch.testing.assert_close(mine, wanted.prev_sample, rtol=1e-4, atol=1e-4)


def test_add_noise_is_that_of_diffusers():
    x0, noise = tensors(2)
    t = torch.tensor([0, 1, 19, 500, 999])
    schedule = schedule_from_config(SD)
    mine = add_noise(x0, noise, *schedule.alpha_sigma(t))
    torch.testing.assert_close(mine, DDIMScheduler(**SD).add_noise(x0, noise, t))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_network_gives_back_x0_and_noise(prediction_type):
    x0, noise = tensors(2)
    t = torch.tensor([0, 19, 259, 500, 979])
    schedule = schedule_from_config(SD).to("cpu", torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    x0, noise = x0.double(), noise.double()
    z = add_noise(x0, noise, alpha, sigma)
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    output = noise if prediction_type == "epsilon" else a * noise - s * x0
    torch.testing.assert_close(predicted_x0(output, z, alpha, sigma, prediction_type), x0)
    torch.testing.assert_close(predicted_eps(output, z, alpha, sigma, prediction_type), noise)


@pytest.mark.parametrize("scaling", [10.0, 1.0])
def test_boundary_scalings_are_those_of_the_lcm_scheduler(scaling):
    stock = LCMScheduler(**SD, timestep_scaling=scaling)
    t = torch.tensor([0, 1, 19, 259, 999])
    wanted = [stock.get_scalings_for_boundary_condition_discrete(int(x)) for x in t]
    c_skip, c_out = boundary_scalings(t.double(), scaling)
    np.testing.assert_allclose(torch.stack([c_skip, c_out], 1), wanted, rtol=1e-12)
    assert (c_skip[0], c_out[0]) == (1, 0)  # f(z, 0) = z


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_consistency_function_is_what_the_lcm_scheduler_returns(prediction_type):
    stock = LCMScheduler(**SD, prediction_type=prediction_type, clip_sample=False)
    schedule = schedule_from_config({**SD, "prediction_type": prediction_type})
    z, output = tensors(2)
    for steps in (1, 4):
        stock.set_timesteps(steps)
        t = stock.timesteps[-1]
        stock._step_index = steps - 1  # the last step returns f itself
        ts = t.expand(5)
        x0 = predicted_x0(output, z, *schedule.alpha_sigma(ts), prediction_type)
        mine = consistency(z, x0, *boundary_scalings(ts.float()))
        wanted = stock.step(output, t, z).prev_sample
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
def test_students_are_sampled_at_times_they_are_trained_at(steps):
    stock = LCMScheduler(**SD)
    stock.set_timesteps(steps)
    start, end = solver_timesteps(torch.arange(50), 50, 1000)
    assert set(stock.timesteps.tolist()) <= set(start.tolist())
    assert start.tolist() == list(range(19, 1000, 20))
    assert end.tolist() == [0, *range(19, 980, 20)]


@pytest.mark.parametrize("dim", [256, 32, 7])
def test_guidance_embedding_is_that_of_diffusers_lcm_pipeline(dim):
    w = torch.tensor([0.0, 1.0, 2.5, 7.0, 14.0])
    stock = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, dim)
    # The angles reach 14000, where fp32 resolves 0.001.
    torch.testing.assert_close(guidance_embedding(w, dim), stock, rtol=0, atol=2e-3)
    half = dim // 2
    angle = 1000 * w.double().numpy()[:, None] * 10000 ** (-np.arange(half) / (half - 1))
    wanted = np.hstack([np.sin(angle), np.cos(angle), np.zeros((5, dim % 2))])
    np.testing.assert_allclose(guidance_embedding(w.double(), dim), wanted, rtol=0, atol=1e-9)


def test_guidance_runs_from_cond_outwards():
    cond, uncond = tensors(2)
    w = torch.tensor([0.0, -1.0, 1.0, 2.5, 6.5])
    mixed = guided(cond, uncond, w)
    torch.testing.assert_close(mixed[0], cond[0])  # w = 0: no guidance
    torch.testing.assert_close(mixed[1], uncond[1])
    for row, scale in enumerate(w + 1):  # diffusers' guidance_scale is w + 1
        pipeline = uncond[row] + scale * (cond[row] - uncond[row])
        torch.testing.assert_close(mixed[row], pipeline, rtol=1e-5, atol=1e-5)


def test_distances():
    a, b = (x.double() for x in tensors(2))
    d = (a - b).numpy()
    assert float(l2_distance(a, b)) == pytest.approx(np.mean(d**2), rel=1e-12)
    for c in (1e-3, 0.5):
        wanted = np.mean(np.hypot(d, c) - c)
        assert float(huber_distance(a, b, c)) == pytest.approx(wanted, rel=1e-12)
    assert float(huber_distance(a, a, 1e-3)) == 0
    # Far from zero it is the absolute difference, close to it d^2 / 2c.
    assert float(huber_distance(a, b, 1e-6)) == pytest.approx(np.mean(abs(d)), rel=1e-4)
    small = a + 1e-6
    assert float(huber_distance(a, small, 1e-3)) == pytest.approx(1e-12 / 2e-3, rel=1e-3)


def test_schedule_moves_with_its_meaning():
    schedule = Schedule(torch.linspace(1, 0, 10), "v_prediction").to("cpu", torch.float64)
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.prediction_type == "v_prediction"
