"""Models that are not here: told in seconds, in one line that says what to do."""

import json
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from shared.errors import UserError
from shared.models import family, hub
from shared.models.family import model_name, native_resolution, resolve_model
from tests.support import warm


@pytest.fixture
def fresh(monkeypatch):
    """Nobody has asked the hub yet; afterwards all is as before."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.unreachable.cache_clear()
    yield
    hub.unreachable.cache_clear()


@pytest.fixture
def deaf():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_does_not_answer_is_asked_once_and_briefly(fresh, deaf, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", deaf)
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    why = hub.unreachable()
    assert deaf in why
    assert constants.is_offline_mode()  # transformers and diffusers do not try either
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_name_that_takes_forever_to_look_up(fresh, monkeypatch):
    import threading

    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    session = SimpleNamespace(head=lambda *_, **__: threading.Event().wait(20))
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    assert "does not answer" in hub.unreachable()


def test_a_hub_that_answers_is_used(fresh, monkeypatch):
    session = SimpleNamespace(head=lambda *_, **__: "404 will do")
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    assert hub.unreachable() == ""
    assert not constants.is_offline_mode()


OFFLINE = {
    "HF_HUB_OFFLINE": {"HF_HUB_OFFLINE": "1"},
    # Another test may have gone offline.
    "refused": {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"},
}
SD15 = """
from shared.errors import run_main; from shared.models.family import resolve_model
run_main(lambda: resolve_model('sd15') and None)
"""
# In a process that has imported it: what a new one reads from the environment.
AFRESH = "import importlib, huggingface_hub.constants as read; importlib.reload(read)\n"


@pytest.mark.parametrize("how", OFFLINE)
def test_a_preset_without_a_network_is_one_line_that_says_what_to_do(repo, tmp_path, how):
    """Where sd15 was never downloaded."""
    environment = {**OFFLINE[how], "PYTHONPATH": str(repo), "HF_HOME": str(tmp_path)}
    check_told(warm.run(["-c", AFRESH + SD15], tmp_path, **environment), how)


@pytest.mark.slow
@pytest.mark.parametrize("how", OFFLINE)
def test_a_new_process_without_a_network_says_the_same(repo, tmp_path, how):
    environment = {**os.environ, **OFFLINE[how], "PYTHONPATH": str(repo), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", SD15]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    check_told(answer, how)


def check_told(answer, how):
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1, answer.stderr  # not a line for every retry
    assert "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir" in answer.stderr
    assert ("HF_HUB_OFFLINE is set" if how == "HF_HUB_OFFLINE" else "127.0.0.1:9") in answer.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RepositoryNotFoundError, "no such repository, or a private one"),
        (GatedRepoError, "accept its terms on"),
        (EntryNotFoundError, "has no unet/config.json"),
        (LocalEntryNotFoundError, "not on this machine"),
    ],
)
def test_what_the_hub_refuses_comes_with_its_remedy(monkeypatch, error, said):
    answer = {"response": SimpleNamespace(headers={}, request=None)}

    def refuse(*_, **__):
        raise error("no\nsuch", **({} if issubclass(error, EntryNotFoundError) else answer))

    local = error is LocalEntryNotFoundError
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr(hub, "unreachable", lambda: "no network" if local else "")
    with pytest.raises(UserError, match=said) as found:
        resolve_model("someone/their-model")
    assert "\n" not in str(found.value)


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_sd):
    """A folder with models, in which no hub is ever asked."""
    for name in ("my-model", "sd15-cats"):
        shutil.copytree(tiny_sd / "unet", tmp_path / "models" / name / "unet")
    (tmp_path / "models" / "dogs.safetensors").touch()
    monkeypatch.chdir(tmp_path)

    def ask(*_):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(family, "hub_file", ask)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("./models/my-modle", "models/my-model"),
        ("models/my-modle", "models/my-model"),  # might be a repository
        ("models/sd15cats", "models/sd15-cats"),
        ("models/Dogs.safetensor", "models/dogs.safetensors"),
        ("dogs.safetensors", ""),
        ("model/my-model/", "models"),
        ("modles/sd15-cats/unet", "models"),
        (r"models\my-model", "models/my-model"),
        ("tiny_sd", "tiny-sd"),
        ("SDXL", "sdxl"),
        ("models/entirely-else", ""),
        ("no/such/folder/at-all", ""),
    ],
)
def test_a_mistyped_path_never_goes_to_the_hub(here, typed, meant):
    with pytest.raises(UserError) as error:
        resolve_model(typed)
    line = str(error.value)
    assert line.count("\n") == 0
    assert (f"did you mean {meant}?" in line) == bool(meant), line
    assert ("did you mean" in line) == bool(meant), line


def test_an_absolute_path_is_answered_with_one(here):
    with pytest.raises(UserError, match=f"did you mean {here}/models/my-model"):
        resolve_model(str(here / "models" / "mymodel"))


def test_a_repository_whose_owner_is_a_folder_here_counts_once_downloaded(here, monkeypatch):
    monkeypatch.setattr(family, "is_downloaded", lambda *_: True)
    with pytest.raises(AssertionError, match="the hub was asked"):
        resolve_model("models/theirs")


def test_home_is_expanded(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert resolve_model("~/models/my-model").source == str(here / "models" / "my-model")


def test_a_package_without_the_repository_says_where_the_small_teachers_are(monkeypatch, tmp_path):
    small = family.FAMILIES["tiny-sd"]
    moved = SimpleNamespace(**{**vars(small), "pretrained": str(tmp_path / "data" / "tiny-sd")})
    monkeypatch.setitem(family.FAMILIES, "tiny-sd", moved)
    monkeypatch.setattr(family, "DATA", tmp_path / "data")
    with pytest.raises(UserError, match=r"part of the repository .*clone the repository"):
        resolve_model("tiny-sd")


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("sdxl", "sdxl"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"),
        ("stabilityai/sd-turbo", "sd-turbo"),
        ("models/my-model", "my-model"),
        ("models/my-model/", "my-model"),
        ("models/my-model/.", "my-model"),
        ("models/my-model/unet/..", "my-model"),
        ("models/dogs.safetensors", "dogs"),
        ("~/models/sd15-cats", "sd15-cats"),
        ("hub/models--someone--their-model/snapshots/0123abc", "their-model"),
    ],
)
def test_folders_are_called_after_the_model(here, monkeypatch, typed, name):
    monkeypatch.setenv("HOME", str(here))
    (here / "hub/models--someone--their-model/snapshots/0123abc").mkdir(parents=True)
    assert model_name(typed) == name


def test_the_folder_one_stands_in(here, monkeypatch):
    monkeypatch.chdir(here / "models" / "my-model")
    assert model_name(".") == "my-model"


@pytest.mark.parametrize(
    ("preset", "sample_size", "pixels"),
    [
        ("sd15", 64, 512),
        ("sd21", 96, 768),
        ("sd21", 64, 512),  # 2.1-base
        ("sdxl", 128, 1024),
        ("sdxl", 64, 512),  # Turbo
        ("sdxl", [96, 128], 768),
        ("sd21", None, 768),
    ],
)
def test_the_resolution_is_the_models_own(repo, tmp_path, preset, sample_size, pixels):
    shutil.copytree(repo / "shared" / "models" / "configs" / preset, tmp_path / "m")
    path = tmp_path / "m" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": sample_size}))
    model = resolve_model(str(tmp_path / "m"))
    assert model.family.name == preset
    assert native_resolution(model) == pixels


def test_another_downscale_of_the_vae(repo, tmp_path):
    shutil.copytree(repo / "shared" / "models" / "configs" / "sd15", tmp_path / "m")
    path = tmp_path / "m" / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": [8, 16, 32]}))
    assert native_resolution(resolve_model(str(tmp_path / "m"))) == 256
