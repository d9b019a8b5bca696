"""Model cards whose lines run, and publishing them, against a hub on loopback."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from PIL import Image

from shared.cache.conditioning import load_conditioning
from shared.cache.paths import CachePaths
from tests.support import warm
from tests.support.hub import serve

TOKEN = "hf_SecretOfTheTests"
# Makes this project one that is not installed, and every hub one that is out of reach.
STRANGER = """
import sys, huggingface_hub.constants
for name in [n for n in sys.modules if n.partition(".")[0] in ("prep", "train", "shared")]:
    del sys.modules[name]
sys.modules.update(prep=None, train=None, shared=None)
huggingface_hub.constants.HF_HUB_OFFLINE = True
"""


@pytest.fixture(autouse=True)
def anonymous(monkeypatch, tmp_path):
    """No token of whoever runs the tests, and no other hub than theirs."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def hub(monkeypatch):
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        yield server


def distil(cli, model, cache, run, *words):
    return cli("train", "distill", "--model", model, "--cache", cache, "--run", run,
               "--train-batch-size", 4, "--lora-rank", 4, "--lora-alpha", 2, "--threads", 1,
               "--max-train-steps", 2, *words)  # fmt: skip


@pytest.fixture(scope="module", params=["lora", "full"])
def run(request, tiny_sd, tiny_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "my-student"
    words = f"--student {request.param} --max-train-steps 2 --train-batch-size 4"
    warm.run(
        ["-m", "train", "distill", "--model", tiny_sd, "--cache", tiny_cache, "--run", folder,
         "--validation-steps", "2", "--threads", "1", *words.split()],
        tiny_sd.parents[1], OMP_NUM_THREADS="1",
    ).check_returncode()  # fmt: skip
    return folder, request.param


def card_of(folder):
    text = (folder / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_card_tells_what_the_student_is(run, tiny_sd):
    folder, kind = run
    header, body = card_of(folder)
    assert header["library_name"] == "diffusers"
    assert header["pipeline_tag"] == "text-to-image"
    assert header["inference"] is False
    assert "base_model" not in header  # a folder is none that others could follow
    assert ("lora" in header["tags"]) == (kind == "lora")
    assert body.strip().startswith("# my-student\n")
    assert "![Prompts at 1, 2, 4 and 8 steps](preview.png)" in body
    newest = folder / "previews/step-00000002.png"
    assert (folder / "preview.png").read_bytes() == newest.read_bytes()
    assert "| max_train_steps | 2 |" in body
    assert "under its licence" in body
    assert ("`guidance_scale` at 1" in body) == (kind == "lora")
    if kind == "full":  # tiny-sd: w in [1, 2.5]
        assert "`guidance_scale` may lie between 2 and 3.5" in body


def test_the_cards_lines_draw_with_stock_diffusers(run, tmp_path, tiny_cache):
    """Run as they stand, in a process that has nothing of this project."""
    folder, _ = run
    (code,) = re.findall(r"```python\n(.*?)```", card_of(folder)[1], re.DOTALL)
    prompt = load_conditioning(CachePaths(tiny_cache).conditioning).prompts[0]
    assert f'"{prompt}"' in code
    answer = warm.run(["-c", STRANGER + code], tmp_path, OMP_NUM_THREADS="1")
    assert answer.returncode == 0, answer.stderr[-3000:]
    picture = np.asarray(Image.open(tmp_path / "picture.png"))
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 5


def test_export_publishes_card_and_weights(run, cli, hub, tmp_path):
    folder, kind = run
    (folder / "evaluation.json").write_text('{"rows": []}')
    (folder / "evaluation.md").write_text("| sampler | FD |\n|---|---|\n| student | 12.5 |\n")
    out = tmp_path / "out"
    answer = cli("train", "export", "--run", folder, "--output", out, "--push-to-hub",
                 "--hub-model-id", "somebody/lightning", "--hub-token", TOKEN)  # fmt: skip
    assert answer.status == 0, answer.err
    assert f"published: {hub.address}/somebody/lightning" in answer.out
    assert hub.repos == ["somebody/lightning"]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    weights = {
        "lora": {"pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"},
        "full": {
            "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
        },
    }[kind]  # fmt: skip
    scheduler = "scheduler/scheduler_config.json"
    assert set(hub.files) == {"README.md", "preview.png", scheduler, *weights}
    for name, content in hub.files.items():
        assert content == (out / name).read_bytes()
    card = hub.files["README.md"].decode()
    assert "| student | 12.5 |" in card
    assert '"somebody/lightning"' in card  # what the snippet loads
    assert str(tmp_path) not in card.partition("from_pretrained")[0]


def test_an_evaluation_goes_with_it_but_not_where_the_cache_was(run, cli, hub, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "evaluated")
    (folder / "evaluation.json").write_text('{"rows": [], "eval_cache": "/secret/place"}')
    (folder / "evaluation.md").write_text("| student | 12.5 |\n")
    answer = cli("train", "export", "--run", folder, "--push-to-hub", "--hub-token", TOKEN)
    assert answer.status == 0, answer.err
    assert hub.files["evaluation.md"] == (folder / "evaluation.md").read_bytes()
    assert not any(b"/secret/place" in content for content in hub.files.values())


def test_the_card_of_an_earlier_checkpoint_tells_nothing_of_the_later(run, cli, tmp_path):
    folder, _ = run
    (folder / "evaluation.json").write_text('{"rows": []}')
    (folder / "evaluation.md").write_text("| student | 12.5 |\n")
    earlier = shutil.copytree(folder / "checkpoints/step-00000002", tmp_path / "step-00000001")
    state = json.loads((earlier / "state.json").read_text())
    (earlier / "state.json").write_text(json.dumps({**state, "step": 1}))
    out = tmp_path / "out"
    answer = cli("train", "export", "--run", folder, "--checkpoint", earlier, "--output", out)
    assert answer.status == 0, answer.err
    card = (out / "README.md").read_text()
    assert "| max_train_steps | 1 |" in card
    assert "12.5" not in card
    assert not (out / "preview.png").exists()  # the run's only one is of step 2


def test_distill_publishes_at_its_end_and_keeps_no_token(
    cli, hub, tiny_sd, tiny_cache, tmp_path, monkeypatch
):
    run = tmp_path / "fast-lcm"
    answer = distil(cli, tiny_sd, tiny_cache, run, "--push-to-hub", "--hub-token", TOKEN)
    assert answer.status == 0, answer.err
    assert hub.repos == ["somebody/fast-lcm"]  # the run's name, the token's account
    assert "pytorch_lora_weights.safetensors" in hub.files
    assert TOKEN not in answer.out + answer.err
    for path in run.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
    assert all(TOKEN.encode() not in content for content in hub.files.values())


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "hf auth login"), (403, "write access"), (404, "check --hub-model-id"), (500, "500")],
)
def test_refusals_of_the_hub_lose_nothing(run, cli, tmp_path, monkeypatch, status, words):
    folder, kind = run
    with serve(status) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        answer = cli("train", "export", "--run", folder, "--output", tmp_path / "out",
                     "--push-to-hub", "--hub-token", TOKEN)  # fmt: skip
    assert answer.status == 1
    assert answer.err.count("\n") == 1
    assert words in answer.err
    assert "safe in" in answer.err
    assert "train export --run" in answer.err
    assert TOKEN not in answer.err
    name = "pytorch_lora_weights.safetensors" if kind == "lora" else "unet/config.json"
    assert (tmp_path / "out" / name).is_file()
    assert (tmp_path / "out/README.md").is_file()


def test_without_a_network_it_is_said_in_a_line(run, cli, tmp_path):
    answer = cli("train", "export", "--run", run[0], "--output", tmp_path, "--push-to-hub",
                 "--hub-token", TOKEN)  # fmt: skip
    assert answer.status == 1
    assert "the hub cannot be reached" in answer.err
    assert answer.err.count("\n") == 1
    assert (tmp_path / "README.md").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--push-to-hub"], "needs a token with write access"),
        (["--push-to-hub", "--hub-token", TOKEN, "--hub-model-id", "a b/c"], "--hub-model-id 'a b"),
        (["--hub-model-id", "a/b"], "--hub-model-id does nothing without --push-to-hub"),
        (["--hub-token", TOKEN], "--hub-token does nothing without --push-to-hub"),
    ],
)
def test_flags_that_cannot_publish_are_refused_before_any_work(
    cli, tiny_sd, tiny_cache, tmp_path, flags, words
):
    answer = distil(cli, tiny_sd, tiny_cache, tmp_path / "run", *flags)
    assert answer.status == 1
    assert words in answer.err
    assert answer.err.count("\n") == 1
    assert TOKEN not in answer.err
    assert not (tmp_path / "run").exists()
