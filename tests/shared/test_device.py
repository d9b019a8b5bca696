"""Which device a flag means, and what is refused in one line."""

import threading
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import InitProcessGroupKwargs

from prep.config import EncodeConfig
from prep.encode.captions import embed_captions
from prep.encode.networks import choose_device, choose_shapes
from shared.errors import UserError
from shared.machine.device import pick_device, use_device
from train.data.prefetch import Ring
from train.trainer.distributed import Distributed


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs; the list has what `set_device` was told, and in which thread."""
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda device: told.append((str(device), threading.current_thread().name)),
    )
    return told


def test_a_number_is_kept_and_its_gpu_becomes_the_current_one(two_gpus):
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert two_gpus == [("cuda:1", "MainThread")]


def test_without_a_number_the_current_gpu_stays(two_gpus):
    """Under a launcher each process has been given its own."""
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cpu") == torch.device("cpu")
    assert two_gpus == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("cuda:2", "--device cuda:2: the last CUDA device here is cuda:1"),
        ("cuda:x", "--device 'cuda:x': only cuda takes a number, such as cuda:1"),
        ("cuda:", "--device 'cuda:': only cuda takes a number, such as cuda:1"),
        ("cuda:-1", "--device 'cuda:-1': only cuda takes a number, such as cuda:1"),
        ("cpu:0", "--device 'cpu:0': only cuda takes a number, such as cuda:1"),
        ("gpu", "--device 'gpu' is not one of auto, cpu, cuda, cuda:0 ..., mps"),
    ],
)
def test_what_is_not_here_is_refused(two_gpus, name, line):
    with pytest.raises(UserError) as error:
        pick_device(name)
    assert str(error.value) == line


def test_a_thread_is_sent_to_the_device_of_its_work(two_gpus):
    for device in map(torch.device, ("cuda:1", "cuda", "cpu")):
        begin = partial(use_device, device)
        with closing(Ring(lambda *_: len(two_gpus), [0, 1], 1, begin).run(0)) as stream:
            assert next(stream) == 1
    assert two_gpus == [("cuda:1", "loader_0")]


def test_captions_are_encoded_in_a_thread_on_their_device(two_gpus):
    encoder = SimpleNamespace(device=torch.device("cuda", 1))
    assert list(embed_captions([[], []], SimpleNamespace(encoder=encoder), 1)) == []
    assert two_gpus == [("cuda:1", "captions_0")]


def test_a_cache_records_the_kind_of_device_alone(two_gpus, tmp_path):
    """Which of a machine's GPUs it is must not make it another cache."""
    config = EncodeConfig(("some.tar",), "tiny-sd", tmp_path, device="cuda:1")
    device = choose_device(config, None)
    assert device == torch.device("cuda", 1)
    shapes = choose_shapes(config, None, device, 512)
    assert shapes.device == "cuda"
    assert choose_device(config, shapes) == device
    assert choose_device(replace(config, device="auto"), shapes) == torch.device("cuda")


@pytest.mark.parametrize(
    ("kind", "resolution", "pictures"),
    [("cuda", 256, 16), ("cuda", 512, 16), ("cuda", 768, 7), ("cuda", 1024, 4), ("cuda", 4096, 1),
     ("cpu", 512, 8), ("cpu", 1024, 8)],
)  # fmt: skip
def test_as_many_pictures_at_once_as_a_gpu_has_room_for(tmp_path, kind, resolution, pictures):
    config = EncodeConfig(("some.tar",), "tiny-sd", tmp_path)
    shapes = choose_shapes(config, None, torch.device(kind), resolution)
    assert shapes.vae_batch_size == pictures
    more = choose_shapes(replace(config, vae_batch_size=9), None, torch.device(kind), resolution)
    assert more.vae_batch_size == 9


def test_processes_of_a_launcher_wait_for_each_other_and_share_the_gpus_out(two_gpus, monkeypatch):
    """Saving a checkpoint or drawing previews may take longer than NCCL's ten minutes."""
    made = []

    def accelerator(**settings):
        made.append(settings)
        return SimpleNamespace(process_index=1, num_processes=2, device=torch.device("cuda", 1))

    monkeypatch.setattr("train.trainer.distributed.Accelerator", accelerator)
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    assert Distributed("cuda").device == torch.device("cuda", 1)
    group = next(h for h in made[0]["kwargs_handlers"] if isinstance(h, InitProcessGroupKwargs))
    assert group.to_kwargs() == {"timeout": timedelta(hours=6)}
    with pytest.raises(UserError, match="--device cuda:1: each of 2 processes takes a GPU of its"):
        Distributed("cuda:1")
