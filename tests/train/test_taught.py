"""Answers from end to end with the tiny SDXL: encode, teach, distil from them, go on, draw."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.support import warm
from tests.support.sources import captioned, encode, prep, write_tar


@pytest.fixture
def taught(tmp_path, tiny_xl):
    source = write_tar(tmp_path / "a.tar", captioned(range(6)))
    cache = encode(source, tmp_path / "cache", model=str(tiny_xl))
    answer = prep("teach", "--cache", cache, "--answers", 2, "--threads", 1)
    assert answer.status == 0, answer.err
    assert "12 answers asked for" in answer.out
    return cache


def train(folder, *words):
    answer = warm.run(["-m", "train", *map(str, words)], folder, OMP_NUM_THREADS="1")
    assert answer.returncode == 0, answer.stderr
    return answer


@pytest.mark.slow
def test_a_lora_is_distilled_from_answers_and_drawn(taught, tmp_path, tiny_xl):
    words = ["distill", "--cache", taught, "--model", tiny_xl, "--run", tmp_path / "run",
             "--train-batch-size", 2, "--lora-rank", 4, "--validation-steps", 0]  # fmt: skip
    first = train(tmp_path, *words, "--max-train-steps", 2)
    assert f"teacher: 2 cached answers a sample ({taught}/answers)" in first.stderr
    more = ("--max-train-steps", 4, "--resume-from-checkpoint", "latest")
    train(tmp_path, *words, *more)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").exists()
    picture = tmp_path / "picture.png"
    train(tmp_path, "sample", "--run", tmp_path / "run", "--output", picture)
    assert np.asarray(Image.open(picture)).std() > 1
