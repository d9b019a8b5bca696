"""`infer learn` and `infer morph` on a CUDA device, in half precision."""

import json
from pathlib import Path

import pytest

from tests.support.learned import shapes

pytestmark = pytest.mark.gpu


def test_a_morph_in_half_precision_reaches_both_ends(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures, prompts = zip(*shapes(2, tmp_path), strict=True)
    answer = cli("infer", "morph", *pictures, "--prompts", *prompts, "--model", "tiny-sd",
                 "--device", "cuda", "--learn-steps", 100, "--frames", 5, "--adain",
                 "--attention", 0.6, "--output", "film")  # fmt: skip
    assert answer.status == 0, answer.err
    assert "on cuda" in answer.err
    assert min(json.loads(Path("film/morph.json").read_text())["psnr"]) >= 30
