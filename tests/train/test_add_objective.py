"""The objective that docs/objectives.md adds as an example, as a reader would: file, name, run."""

from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from shared.diffusion import Schedule
from tests.conftest import ROOT
from tests.support.docs import blocks
from tests.support.lcd_reference import (
    Affine,
    G,
    Stock,
    make_batch,
    make_data,
    reference_abar,
    reference_guidance_embedding,
)
from tests.support.runs import metrics
from train import flag_groups
from train.config import DistillConfig
from train.data.loader import Loader
from train.objectives import OBJECTIVES
from train.trainer.loop import distill
from train.trainer.setup import prepare


@pytest.fixture
def imitation(monkeypatch):
    """The page's code, registered."""
    (code,) = (b.text for b in blocks(ROOT / "docs/objectives.md") if b.language == "python")
    names: dict = {"__name__": "train.objectives.imitation"}
    exec(compile(code, "imitation.py", "exec"), names)
    known = Literal[(*get_args(flag_groups.ObjectiveName), "imitation")]
    monkeypatch.setattr(flag_groups, "ObjectiveName", known)
    monkeypatch.setitem(OBJECTIVES, "imitation", names["OBJECTIVE"])
    return names


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_it_trains_draws_and_exports(imitation, cli, tiny_cache, tmp_path, kind):
    run = tmp_path / "run"
    words = ["distill", "--model", "tiny-sd", "--cache", tiny_cache, "--run", run, "--student",
             kind, "--objective", "imitation", "--w-min", 1, "--w-max", 1, "--train-batch-size", 4,
             "--threads", 1, "--logging-steps", 1,
             "--validation-steps", 0, "--report-to", "none"]  # fmt: skip
    answer = cli("train", *words, "--max-train-steps", 2)
    assert answer.status == 0, answer.err
    assert "w in [1, 1]" in answer.err
    assert [line["step"] for line in metrics(run)] == [1, 2]
    picture = tmp_path / "picture.png"
    answer = cli("train", "sample", "--run", run, "--steps", 2, "--threads", 1, "--output", picture)
    assert answer.status == 0, answer.err
    assert np.asarray(Image.open(picture)).std() > 1
    card = (run / "README.md").read_text()
    assert "that needs no second pass for guidance, of" in card
    answer = cli("train", *words, "--snr-gamma", 5, "--run", tmp_path / "other")
    assert answer.err.startswith("error: --snr-gamma is for --objective denoise and means nothing")


def test_it_learns(imitation, tiny_cache, tiny_sd, tmp_path):
    """Four pictures' guided outputs, at 32 timesteps and noises that training does not draw."""
    config = DistillConfig(
        model=str(tiny_sd), cache=tiny_cache, run=tmp_path / "run", objective="imitation",
        train_batch_size=4, max_train_steps=10, learning_rate=1e-3, lora_rank=8, w_min=2.0,
        w_max=2.0, validation_steps=0, report_to=(), threads=1,
    )  # fmt: skip
    run = prepare(config)
    loader = run.loader
    loader.order = replace(loader.order, sizes=(4,))
    order, spec = replace(loader.order, batch_size=32), replace(loader.spec, seed=12345)
    batches = Loader(loader.buckets, order, spec, loader.latents, loader.unconditional).batches()
    probe = next(batches)

    @torch.no_grad()
    def loss() -> float:
        return float(run.objective(probe, run.empty, run.student))

    before = loss()
    distill(run)
    assert loss() < 0.9 * before
    batches.close()


def test_its_loss_is_the_guided_teachers_output(imitation):
    rng, data = np.random.default_rng(0), make_data(1)
    student, teacher = Affine.random(rng, G), Affine.random(rng, G)
    batch, empty = make_batch(data, torch.float64)
    loss = imitation["Imitation"](Schedule(torch.tensor(reference_abar()), "epsilon"))
    assert (loss.intervals, loss.uniforms, loss.noises) == (1000, 0, 0)
    mine = loss(batch, empty, Stock(student, teacher, told=False))
    t, none = data["index"], np.zeros((6, G))
    a, b = (np.sqrt(x)[:, None, None, None] for x in (reference_abar()[t], 1 - reference_abar()[t]))
    z = a * data["latents"] + b * data["noise"]
    cond = teacher(z, t, data["text"], none)
    uncond = teacher(z, t, np.repeat(data["empty"], 6, 0), none)
    wanted = cond + data["w"][:, None, None, None] * (cond - uncond)
    untold = reference_guidance_embedding(np.zeros(6), G)
    expected = np.mean((student(z, t, data["text"], untold) - wanted) ** 2)
    assert mine.item() == pytest.approx(expected, rel=1e-9)
