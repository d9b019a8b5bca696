"""Teachers that predict v, end at zero SNR, or have another unconditional embedding."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from shared.cache.conditioning import TextEmbeds, load_conditioning
from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.diffusion import add_noise, predicted_eps, predicted_x0, schedule_from_config
from shared.errors import UserError
from shared.models.family import resolve_model
from shared.networks.cache_checks import check_fit
from shared.networks.denoiser import call_unet, load_schedule
from shared.networks.sampling import draw_latents, teacher_scheduler
from train.config import DistillConfig
from train.networks.build import build_student
from train.objectives import OBJECTIVES
from train.objectives.lcd import LCD

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {
    **SD,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,  # DDIM ends at x0 itself, not at the noise of step 0
}


def with_scheduler(model, folder, **changes):
    """A copy of a model whose scheduler_config.json says something else."""
    shutil.copytree(model, folder)
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.fixture
def data():
    """One picture in four copies with noises, and the v that a perfect network would answer."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 4, 6, 5, generator=generator).expand(4, 4, 6, 5)
    return x0, torch.randn(4, 4, 6, 5, generator=generator)


def perfect_v(schedule, x0):
    """The v of the one picture that there is; at the terminal step it is -x0, whatever z is."""

    def predict(z, t):
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in schedule.alpha_sigma(t))
        return alpha * (z - alpha * x0) / sigma - sigma * x0

    return predict


def test_conversions_are_exact_at_the_terminal_step(data):
    x0, noise = data
    schedule = schedule_from_config(ZERO_SNR)
    t = torch.full((4,), 999)
    alpha, sigma = schedule.alpha_sigma(t)
    assert (alpha == 0).all()
    assert (sigma == 1).all()
    z = add_noise(x0, noise, alpha, sigma)
    assert torch.equal(z, noise)
    assert torch.equal(predicted_x0(-x0, z, alpha, sigma, "v_prediction"), x0)
    assert torch.equal(predicted_eps(-x0, z, alpha, sigma, "v_prediction"), noise)
    stock = DDIMScheduler(**ZERO_SNR)
    stock.set_timesteps(50)
    assert torch.equal(stock.step(-x0, 999, z).pred_original_sample, x0)


@pytest.mark.parametrize("left_out", [set(), {"beta_start"}, set(SD)])
def test_a_student_is_drawn_on_the_schedule_it_was_trained_on(left_out):
    """Also where scheduler_config.json leaves something to the defaults, as DDIM's may."""
    config = {name: value for name, value in SD.items() if name not in left_out}
    drawn = OBJECTIVES["lcd"].sampler.build(config, DistillConfig()).alphas_cumprod
    torch.testing.assert_close(drawn, schedule_from_config(config).alphas_cumprod)
    torch.testing.assert_close(drawn, DDIMScheduler(**config).alphas_cumprod)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("sampler", ["student", "ddim", "dpmsolver++"])
def test_samplers_find_the_picture_from_pure_noise(data, sampler, steps):
    x0 = data[0][:1]
    if sampler == "student":
        scheduler = OBJECTIVES["lcd"].sampler.build(ZERO_SNR, DistillConfig())
    else:
        scheduler = teacher_scheduler(sampler, "trailing", ZERO_SNR)
    predict = perfect_v(schedule_from_config(ZERO_SNR), x0)
    found = draw_latents(predict, scheduler, steps, (4, 6, 5), [3], torch.device("cpu"))
    # DPM-Solver takes 2**-24 for the last abar, diffusers' way round a division by zero.
    torch.testing.assert_close(found, x0, rtol=0, atol=2e-3)


def test_the_loss_of_a_perfect_teacher_and_student_is_zero_at_the_terminal_step(data):
    x0, noise = data
    schedule = schedule_from_config(ZERO_SNR)
    v = perfect_v(schedule, x0[:1])

    class Networks:
        def student(self, z, t, batch):
            return v(z, t)

        def target(self, z, t, batch):
            return v(z, t)

        def teacher(self, z, t, batch, empty):
            return v(z, t), v(z, t)

    last, w = torch.full((4,), 49), torch.full((4,), 7.0)
    batch = SimpleNamespace(latents=x0, noise=noise, index=last, w=w, answers=None)
    loss = LCD(schedule, 50, 10.0, "l2", 1e-3)(batch, None, Networks())
    assert 0 <= float(loss) < 1e-5


def test_noise_prediction_at_zero_snr_is_refused(tiny_sd, tiny_cache, tmp_path, cli):
    model = with_scheduler(tiny_sd, tmp_path / "model", rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match=r"zero terminal SNR.*prediction_type epsilon"):
        load_schedule(str(model))
    answer = cli("train", "distill", "--model", model, "--cache", tiny_cache, "--run",
                 tmp_path / "run", "--threads", 1)  # fmt: skip
    assert answer.status == 1
    assert answer.err.splitlines()[-1].startswith(f"error: {model}: zero terminal SNR")


def test_a_zero_snr_teacher_distils_and_its_student_draws(tiny_sd, tiny_cache, tmp_path, cli):
    model = with_scheduler(
        tiny_sd, tmp_path / "model", rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    run = tmp_path / "run"
    prompt = load_conditioning(CachePaths(tiny_cache).conditioning).prompts[0]
    answer = cli("train", "distill", "--model", model, "--cache", tiny_cache, "--run", run,
                 "--max-train-steps", 3, "--train-batch-size", 4, "--lora-rank", 4,
                 "--validation-steps", 0, "--logging-steps", 1, "--threads", 1)  # fmt: skip
    assert answer.status == 0, answer.err
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]
    assert all(0 < loss < 100 for loss in losses)
    weights = load_file(run / "pytorch_lora_weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    answer = cli("train", "sample", "--run", run, "--prompt", prompt,
                 "--output", tmp_path / "picture.png", "--threads", 1)  # fmt: skip
    assert answer.status == 0, answer.err


def test_the_unconditional_embedding_must_be_the_teachers_kind(tiny_xl, tiny_xl_cache, tmp_path):
    """SDXL takes zeros, some of its descendants the encoded empty prompt."""
    check_fit(open_manifest(tiny_xl_cache), resolve_model(str(tiny_xl)), tiny_xl_cache)
    model = tmp_path / "model"
    shutil.copytree(tiny_xl, model)
    index = json.loads((model / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = False
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"holds zeros.*wants the encoded empty prompt"):
        check_fit(open_manifest(tiny_xl_cache), resolve_model(str(model)), tiny_xl_cache)


def test_micro_conditioning_reaches_the_teacher(tiny_xl):
    """Another original size, another answer: time_ids are no ornament."""
    unet = UNet2DConditionModel.from_pretrained(tiny_xl / "unet", torch_dtype=torch.float32)
    torch.manual_seed(0)
    text = TextEmbeds(torch.randn(1, 16, 128), torch.randn(1, 64))
    z, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    answers = [
        call_unet(unet, z, t, text, torch.tensor([ids], dtype=torch.int32))
        for ids in ([64, 64, 0, 0, 64, 64], [1023, 64, 0, 0, 64, 64], [1024, 64, 0, 0, 64, 64])
    ]
    assert (answers[0] - answers[1]).abs().max() > 1e-3
    assert not torch.equal(answers[1], answers[2])


def test_a_bf16_lora_run_holds_its_teacher_in_bf16(tiny_sd, tiny_cache, tmp_path, cli):
    """Half the memory for what is frozen; what is trained and stored stays fp32."""
    config = DistillConfig(
        model=str(tiny_sd), cache=tiny_cache, run=tmp_path, mixed_precision="bf16", lora_rank=4
    )
    student = build_student(str(tiny_sd), config)
    trained = student.trainable()
    frozen = [p for name, p in student.unet.named_parameters() if name not in trained]
    matrices = [parameter for parameter in frozen if parameter.ndim > 1]  # norms stay fp32
    assert {parameter.dtype for parameter in matrices} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    run = tmp_path / "run"
    answer = cli("train", "distill", "--model", tiny_sd, "--cache", tiny_cache, "--run", run,
                 "--max-train-steps", 2, "--train-batch-size", 4, "--lora-rank", 4, "--threads", 1,
                 "--validation-steps", 2, "--mixed-precision", "bf16")  # fmt: skip
    assert answer.status == 0, answer.err
    assert (run / "previews/step-00000002.png").is_file()  # drawn with it, too
    weights = load_file(run / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
