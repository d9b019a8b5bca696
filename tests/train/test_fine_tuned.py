"""What `--objective denoise` makes: pictures, exports, evaluations, and flags as typed."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file

from shared.cache.conditioning import load_conditioning
from shared.cache.paths import CachePaths
from train.config import DistillConfig, EvaluateConfig
from train.evaluation import evaluate, teacher_results
from train.trainer.loop import distill
from train.trainer.setup import prepare


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


CASES = [
    ("sd", "full"),
    ("xl", "lora"),  # and each part of the other is one of these
    pytest.param(("sd", "lora"), marks=pytest.mark.slow),
]
PIPELINES = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def made(request, tmp_path_factory):
    """A finished run: family, kind, configuration, a prompt."""
    family, kind = request.param
    names = {"sd": ("tiny_cache", "tiny_sd"), "xl": ("tiny_xl_cache", "tiny_xl")}[family]
    cache, model = map(request.getfixturevalue, names)
    config = DistillConfig(
        model=str(model), cache=cache, run=tmp_path_factory.mktemp("run"), objective="denoise",
        student=kind, train_batch_size=4, max_train_steps=4, validation_steps=4, threads=1,
        lora_rank=4, lora_alpha=6.0, learning_rate=1e-2 if kind == "lora" else 1e-3,
    )  # fmt: skip
    distill(prepare(config))
    return family, kind, config, load_conditioning(CachePaths(cache).conditioning).prompts[1]


def draw_stock(made, student: bool = True) -> np.ndarray:
    """By diffusers alone, 6 DDIM steps at guidance 4."""
    family, kind, config, prompt = made
    more = {}
    if student and kind == "full":
        more["unet"] = UNet2DConditionModel.from_pretrained(config.run / "unet")
    pipe = PIPELINES[family].from_pretrained(config.model, dtype=torch.float32, **more)
    if student and kind == "lora":
        pipe.load_lora_weights(config.run)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    seed = torch.Generator().manual_seed(2)
    answer = pipe(prompt, num_inference_steps=6, guidance_scale=4.0, output_type="np",
                  generator=seed, height=64, width=64)  # fmt: skip
    return (answer.images[0] * 255).round().astype(int)


# ---- What comes out of it.


def test_stock_diffusers_draws_what_train_sample_draws(made, cli, tmp_path):
    _, kind, config, prompt = made
    picture = tmp_path / "picture.png"
    words = ("--steps", 6, "--guidance-scale", 4, "--seed", 2, "--threads", 1, "--output", picture)
    answer = cli("train", "sample", "--run", config.run, "--prompt", prompt, *words)
    assert answer.status == 0, answer.err
    ours, stock = np.asarray(Image.open(picture)).astype(int), draw_stock(made)
    assert np.abs(ours - stock).mean() < 1
    assert np.abs(stock - draw_stock(made, student=False)).mean() > 2  # it is not the teacher
    if kind == "full":
        stored = json.loads((config.run / "unet" / "config.json").read_text())
        assert stored["time_cond_proj_dim"] is None  # an ordinary UNet


def test_previews_are_drawn_like_that(made):
    _, _, config, _ = made
    sheet = Image.open(config.run / "previews" / "step-00000004.png")
    assert np.asarray(sheet).std() > 5
    assert sheet.height > sheet.width  # a column of 25 steps, a row per prompt


def test_exporting_again_gives_the_same(made, cli, tmp_path):
    _, kind, config, _ = made
    answer = cli("train", "export", "--run", config.run, "--output", tmp_path)
    assert answer.status == 0, answer.err
    name = "unet/diffusion_pytorch_model" if kind == "full" else "pytorch_lora_weights"
    first, second = (load_file(at / f"{name}.safetensors") for at in (config.run, tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_evaluate_draws_it_as_the_teachers_reference(settings, monkeypatch, tmp_path, tiny_cache):
    """A student that has hardly moved has the figures of the teacher."""
    config = settings(max_train_steps=1, learning_rate=1e-12)
    distill(prepare(config))
    teacher = (("ddim", 5), ("ddim", 1))
    monkeypatch.setattr(evaluate, "REFERENCE", teacher[0])
    monkeypatch.setattr(teacher_results, "REFERENCE", teacher[0])
    monkeypatch.setattr(teacher_results, "SOLVER_SAMPLINGS", teacher[1:])
    monkeypatch.setattr(teacher_results, "TEACHER_SAMPLINGS", teacher)
    monkeypatch.setattr(teacher_results, "TRIED", 5)
    monkeypatch.setattr(
        teacher_results, "keep_reference", lambda *_: None
    )  # the cache is everybody's
    monkeypatch.setattr(evaluate, "TIMED", 2)
    evaluate.evaluate(
        EvaluateConfig(
            run=config.run, eval_cache=tiny_cache, num_samples=65, output=tmp_path, threads=1
        )
    )
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [(row["sampler"], row["steps"]) for row in rows] == [*teacher, ("student", 5)]
    assert rows[2]["fd"] == pytest.approx(rows[0]["fd"], rel=1e-3)
    assert rows[2]["high_frequency"] == pytest.approx(1, rel=1e-3)


def typed(config: DistillConfig) -> list:
    return ["distill", "--model", "tiny-sd", "--cache", config.cache, "--run", config.run,
            "--threads", 1, "--validation-steps", 0, "--max-train-steps", 1,
            "--train-batch-size", 2]  # fmt: skip


# ---- As people type it.


def test_a_run_from_the_command_line(cli, settings):
    config = settings()
    answer = cli("train", *typed(config), "--objective", "denoise", "--noise-offset", 0.05,
                 "--snr-gamma", 5, "--lora-rank", 2)  # fmt: skip
    assert answer.status == 0, answer.err
    assert answer.out == f"student: {config.run / 'pytorch_lora_weights.safetensors'}\n"
    assert "t in [0, 999]" in answer.err
    assert "w in" not in answer.err
    stored = json.loads((config.run / "config.json").read_text())
    assert [stored[name] for name in ("objective", "noise_offset", "snr_gamma")] == [
        "denoise", 0.05, 5.0,
    ]  # fmt: skip
    assert stored["learning_rate"] == 1e-4


def test_learning_rate_of_a_full_student_unless_given(settings):
    run = prepare(settings(student="full", learning_rate=None, dry_run=True))
    assert run.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--w-min", "1"], ["--w-min is for --objective lcd"]),
        (["--num-ddim-timesteps", "20"], ["--num-ddim-timesteps", "leave it out"]),
        (["--huber-c", "0.1"], ["--huber-c"]),
        (["--loss-type", "l2"], ["--loss-type"]),
        (["--ema-decay", "0.9"], ["--ema-decay"]),
        (["--guidance-init", "random"], ["--guidance-init"]),
        (["--snr-gamma", "0"], ["--snr-gamma 0 must be above 0"]),
        (["--snr-gamma", "nan"], ["--snr-gamma nan"]),
        (["--noise-offset", "-0.1"], ["--noise-offset -0.1"]),
        (["--objective", "lcd", "--snr-gamma", "5"], ["--snr-gamma is for --objective denoise"]),
        (["--objective", "lcd", "--noise-offset", "0.1"], ["--noise-offset", "--objective lcd"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_mistakes(cli, settings, words, parts):
    config = settings()
    answer = cli("train", *typed(config), "--objective", "denoise", *words)
    assert answer.status in (1, 2)  # 2: the command line alone shows it
    line = answer.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert all(part in line for part in parts)
    assert not config.run.exists()


def test_more_steps_than_the_schedule_has(made, cli, tmp_path):
    *_, config, prompt = made
    answer = cli("train", "sample", "--run", config.run, "--prompt", prompt, "--steps", 1001)
    assert answer.status == 1
    assert "--steps 1001 must be 1 to 1000" in answer.err
