"""How well pictures are learned and morphed, measured with tiny-sd (docs/learning-pictures.md)."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.learned import photograph, shapes

MODEL = ("--model", "tiny-sd", "--threads", 1)
HARD = ("--train-batch-size", 16)  # for what is not of the model's world
FIGURES = r"redrawn: ([\d.]+) dB .* \(without the LoRA ([\d.]+) dB\), ([\d.]+) dB"

pytestmark = pytest.mark.slow


def learn(cli, picture, prompt, *words):
    """PSNR in dB: from plain noise, without the LoRA, from inverted noise; and the run."""
    answer = cli("infer", "learn", picture, *MODEL, "--prompt", prompt, *words)
    assert answer.status == 0, answer.err
    found = re.search(FIGURES, answer.err)
    return (*map(float, found.groups()), Path(answer.out.rstrip("\n")))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_pictures_of_shapes_are_learned(cli, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    picture, prompt = shapes(3, tmp_path)[number]
    plain, without, inverted, _ = learn(cli, picture, prompt)
    assert plain >= 30
    assert inverted >= 30
    assert without < 20


@pytest.mark.parametrize("seed", [0, 1])
def test_pictures_like_photographs_are_learned(cli, tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    picture = photograph(tmp_path / "photograph.png", seed)
    plain, without, inverted, _ = learn(cli, picture, "a photo", "--steps", 500, *HARD)
    assert plain >= 30
    assert inverted >= 30
    assert without < 20


def test_a_morph_is_even_and_reaches_both_ends(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures, prompts = zip(*shapes(2, tmp_path), strict=True)
    found = {}
    for name, words in {"plain": ["--no-learn"], "whole": ["--adain", "--reschedule"]}.items():
        answer = cli("infer", "morph", *pictures, "--prompts", *prompts, *MODEL, *words,
                     "--output", name)  # fmt: skip
        assert answer.status == 0, answer.err
        found[name] = json.loads(Path(name, "morph.json").read_text())
    assert min(found["whole"]["psnr"]) >= 30
    assert found["whole"]["unevenness"] <= 1.5
    assert found["plain"]["unevenness"] > 2
    first = np.asarray(Image.open("whole/frames/000.png")).astype(int)
    last = np.asarray(Image.open("whole/frames/015.png")).astype(int)
    assert np.abs(first - last).mean() > 20
