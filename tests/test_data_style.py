"""`make style`: what its trainings are told, what it refuses, and a run of it all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import style
from data.side_by_side import Workers
from data.style import SCALES, TRAININGS, Studio, Training
from shared.cli.config import parse
from shared.errors import UserError
from train.config import DistillConfig

REPO = Path(__file__).resolve().parents[1]
BY_NAME = {training.name: training for training in TRAININGS}


def studio_at(folder: Path, budget: int = 40, pictures: int = 200, captions: int = 640) -> Studio:
    return Studio(folder, budget, pictures, captions, Workers(folder / "logs", 1))


@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.name)
def test_each_training_is_told_what_it_is_for(tmp_path: Path, training: Training) -> None:
    studio = studio_at(tmp_path)
    flags = parse(DistillConfig, style.training_flags(studio, training), "train distill")
    assert flags.run == tmp_path / "runs" / training.name
    assert flags.cache == tmp_path / "caches" / training.cache
    assert flags.max_train_steps == 40
    begun = {"lcf": tmp_path / "runs/start", "denoise": tmp_path / "runs/start/guidance-3"}
    assert flags.init_student == begun.get(training.name)
    worn = {"styled": (str(tmp_path / "runs/style/pytorch_lora_weights.safetensors"),)}
    assert tuple(map(str, flags.teacher_lora)) == worn.get(training.name, ())


def test_both_ways_of_fine_tuning_have_the_same_steps_and_rate(tmp_path: Path) -> None:
    studio = studio_at(tmp_path)
    told = [
        parse(DistillConfig, style.training_flags(studio, BY_NAME[name]), "train distill")
        for name in ("lcf", "denoise")
    ]
    for name in ("max_train_steps", "learning_rate", "train_batch_size", "cache", "seed"):
        assert len({getattr(flags, name) for flags in told}) == 1, name


def test_what_is_begun_with_or_worn_stands_before_it() -> None:
    names = [training.name for training in TRAININGS]
    assert len(BY_NAME) == len(names)
    for training in TRAININGS:
        for other in (training.begins, training.wears):
            assert other is None or names.index(other) < names.index(training.name)


def test_the_tables_have_every_student_and_every_mixture(tmp_path: Path) -> None:
    studio = studio_at(tmp_path)
    adapted = [(line.name, line.steps) for line in style.adapted_lines(studio)]
    few = [(name, steps) for name in ("start", "lcf", "denoise") for steps in (1, 4)]
    assert adapted == few
    mixed = [line.name for line in style.mixed_lines(studio) if line.steps == 4]
    assert mixed == [
        "few-steps", "style alone", *(f"+ style {scale:g}" for scale in SCALES), "styled"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"budget": 0}, "--budget 0 trains nothing; choose 1 or more"),
        ({"pictures": 31}, "--pictures 31 cannot be; choose 32 to 2,048"),
        ({"captions": 64}, "--num-samples 64 cannot be; choose 65 to 1,024"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, numbers: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        style.check(studio_at(tmp_path, **numbers))


def test_lcd_takes_the_seconds_of_its_steps(tmp_path: Path) -> None:
    studio = studio_at(tmp_path, budget=1000)
    seconds = style.seconds_of(studio, BY_NAME["start"])
    assert seconds == pytest.approx(1000 * style.STEP_SECONDS, rel=0.01)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_runs_from_drawing_to_the_tables_and_goes_on(tmp_path: Path) -> None:
    words = ["--budget", "2", "--pictures", "32", "--num-samples", "65", "--folder", tmp_path]
    command = [sys.executable, "-m", "data.style", *words]
    said = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout
    for training in TRAININGS:
        assert f"to do: {training.name}, 2 steps on {training.cache} pictures" in said
    assert "all of it takes about" in said
    told = json.loads((tmp_path / "style.json").read_text())
    assert told["mixed"][0]["student"] == "few-steps"
    assert {row["steps"] for row in told["adapted"]} == {1, 4}
    for row in told["adapted"] + told["mixed"]:
        assert 0 <= row["both"] <= min(row["style"], row["content"]) <= 1
        assert row["fd"] > 0
    # Two steps move nothing: the model with a LoRA still draws the captions, without the style.
    alone = next(row for row in told["mixed"] if row["steps"] == 50)
    assert alone["content"] >= 0.9
    assert alone["style"] <= 0.1
    for name in ("adapted.png", "mixed.png"):
        assert (tmp_path / name).stat().st_size > 5000
    trained = tmp_path / "runs/styled/pytorch_lora_weights.safetensors"
    before = trained.stat().st_mtime_ns
    subprocess.run(command, cwd=REPO, check=True)
    assert trained.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "style.json").read_text()) == told
