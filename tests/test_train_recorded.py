"""Looking at somebody's run asks nobody for the model that it names."""

import socket

import huggingface_hub
import pytest

from shared.errors import UserError
from train import artist


@pytest.fixture
def run_that_names(monkeypatch, tmp_path):
    """Opens a run with this model and VAE in its configuration; any connection fails the test."""

    def refuse(*words, **_):
        raise AssertionError(f"asked: {words}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def opened(recorded, recorded_vae=None, **flags):
        config = {"model": str(recorded), "vae": recorded_vae}
        monkeypatch.setattr(artist, "load_student", lambda *_: (None, config))
        return artist.open_artist(tmp_path, 1, "cpu", None, **flags)

    return opened


def test_a_model_that_is_not_here_is_to_be_named(run_that_names, tiny_sd):
    with pytest.raises(UserError, match="say --model someone/model if you trust it"):
        run_that_names("someone/model")
    assert run_that_names("someone/model", model=str(tiny_sd)).model.source == str(tiny_sd)
    with pytest.raises(UserError, match="say --vae someone/vae if you trust it"):
        run_that_names(tiny_sd, "someone/vae")
    assert run_that_names(tiny_sd, "someone/vae", vae=str(tiny_sd)).vae_source == str(tiny_sd)
    assert run_that_names(tiny_sd).vae_source == str(tiny_sd)
