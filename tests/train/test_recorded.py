"""Looking at somebody's run asks nobody for the model that it names."""

import json
import socket

import huggingface_hub
import pytest

from shared.errors import UserError
from train.config import RunConfig, SampleConfig
from train.evaluation import artist


@pytest.fixture
def run_that_names(monkeypatch, tmp_path):
    """Opens a run with this model and VAE in its configuration; any connection fails the test."""

    def refuse(*words, **_):
        raise AssertionError(f"asked: {words}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def opened(recorded, recorded_vae=None, **flags):
        config = RunConfig(str(recorded), tmp_path, tmp_path, vae=recorded_vae)
        monkeypatch.setattr(artist, "load_student", lambda *_: (None, config))
        return artist.open_artist(tmp_path, SampleConfig(threads=1, device="cpu", **flags))

    return opened


def test_a_model_that_is_not_here_is_to_be_named(run_that_names, tiny_sd):
    with pytest.raises(UserError, match="say --model someone/model if you trust it"):
        run_that_names("someone/model")
    assert run_that_names("someone/model", model=str(tiny_sd)).model.source == str(tiny_sd)
    with pytest.raises(UserError, match="say --vae someone/vae if you trust it"):
        run_that_names(tiny_sd, "someone/vae")
    assert run_that_names(tiny_sd, "someone/vae", vae=str(tiny_sd)).vae_source == str(tiny_sd)
    assert run_that_names(tiny_sd).vae_source == str(tiny_sd)


@pytest.fixture
def strangers_run(cli, tiny_cache, tmp_path, monkeypatch):
    """A run whose configuration names a repository of the hub and a bucket; nobody is asked."""
    run = tmp_path / "run"
    words = "--max-train-steps 1 --train-batch-size 1 --validation-steps 0 --report-to none"
    answer = cli(
        "train", "distill", "--model", "tiny-sd", "--cache", tiny_cache, "--run", run,
        "--lora-rank", 2, "--threads", 1, *words.split(),
    )  # fmt: skip
    assert answer.status == 0, answer.err
    stored = json.loads((run / "config.json").read_text())
    stored |= {"model": "someone/model", "cache": "s3://bucket/cache"}
    (run / "config.json").write_text(json.dumps(stored))

    def refuse(*words, **_):
        raise AssertionError(f"asked: {words}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return run


def test_no_command_asks_whom_a_run_names(cli, strangers_run, tiny_sd, tmp_path):
    model, output = ("--model", tiny_sd), ("--output", tmp_path / "out.png")
    for words in (("sample", *output), ("evaluate",), ("export",)):
        answer = cli("train", words[0], "--run", strangers_run, *words[1:])
        assert answer.status == 1
        assert "say --model someone/model if you trust it" in answer.err
    for command, flag in (("sample", "--cache"), ("evaluate", "--eval-cache")):
        answer = cli("train", command, "--run", strangers_run, *model)
        assert answer.status == 1
        assert f"pass {flag} s3://bucket/cache" in answer.err
    answer = cli("train", "export", "--run", strangers_run, *model)
    assert answer.status == 0, answer.err
