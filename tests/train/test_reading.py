"""How batches are read: threads, waiting, files at once, devices."""

import contextlib
import os
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from shared.cache.conditioning import TextEmbeds
from shared.cache.draws import choose
from tests.support.loader import (
    equal,
    joined,
    make_cache,
    open_loader,
    take,
)


@pytest.fixture
def posterior(tmp_path):
    """Two shards of 8 x 8 latents and one of 4 x 6, two views, up to three captions, SDXL."""
    return make_cache(tmp_path / "cache", [(7, 8, 8), (5, 4, 6), (9, 8, 8)])


def test_moving_to_the_cpu_keeps_every_field(posterior):
    batch = take(open_loader(posterior), 1)[0]
    moved = batch.to(torch.device("cpu"))
    assert equal(joined([moved]), joined([batch]))
    assert isinstance(batch.text, TextEmbeds)
    assert torch.equal(batch.text.prompt_embeds, batch.prompt_embeds)
    none = replace(batch, pooled_prompt_embeds=None, time_ids=None).to(torch.device("cpu"))
    assert none.time_ids is None


def test_draws_see_the_real_number_of_captions(posterior, monkeypatch):
    seen = set()

    def watching(spec, rng, num_captions):
        seen.add(num_captions)
        return choose(spec, rng, num_captions)

    monkeypatch.setattr("train.data.loader.choose", watching)
    take(open_loader(posterior), 10)
    assert seen == {1, 2, 3}


def test_records_are_not_read_where_one_caption_is_kept(tiny_cache):
    loader = open_loader(tiny_cache)
    loader.buckets[0].records = SimpleNamespace()  # calling it would fail
    assert len(take(loader, 3)) == 3


def test_waiting_is_counted_in_seconds(tiny_cache, monkeypatch):
    loader = open_loader(tiny_cache, threads=1)
    real = loader.fill

    def slow(index, slots):
        time.sleep(0.05)
        return real(index, slots)

    monkeypatch.setattr(loader, "fill", slow)
    assert loader.waited == 0
    start = time.perf_counter()
    take(loader, 8)
    assert 0.35 < loader.waited < time.perf_counter() - start


def test_a_consumer_that_is_slower_does_not_wait(tiny_cache):
    loader = open_loader(tiny_cache, threads=2)
    batches = iter(loader)
    next(batches)
    before = loader.waited
    for _ in range(10):
        time.sleep(0.1)
        next(batches)
    batches.close()
    assert loader.waited - before < 0.5


def test_what_is_not_in_the_page_cache_is_read_all_the_same(posterior, monkeypatch):
    wanted = take(open_loader(posterior), 12)
    real = os.preadv

    def cold(fd, views, offset, flags=0):
        if flags:
            raise BlockingIOError
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", cold)
    found = take(open_loader(posterior), 12)
    assert all(equal(joined([a]), joined([b])) for a, b in zip(found, wanted, strict=True))


def open_files(folder) -> int:
    count = 0
    for link in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += str(folder) in os.readlink(f"/proc/self/fd/{link}")
    return count


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    root = make_cache(tmp_path / "cache", [(2, 4, 4)] * 12)
    wanted = take(open_loader(root), 12)
    monkeypatch.setattr("train.data.local.OPEN_FILES", 3)
    batches = iter(open_loader(root, threads=4))
    for batch in wanted:
        assert equal(joined([next(batches)]), joined([batch]))
        assert open_files(root) <= 3 + 2 * 4  # those kept, and those that threads read or open
    batches.close()
    assert open_files(root) == 0


def test_readers_begin_on_the_device_of_their_batches(posterior, monkeypatch):
    """A new thread's current device is cuda:0, where it would take memory of another process."""
    told = []
    monkeypatch.setattr(
        "train.data.loader.use_device",
        lambda device: told.append((device.type, threading.current_thread().name)),
    )
    take(open_loader(posterior, threads=2), 8)
    assert ("cpu", "loader_0") in told
    assert len(set(told)) == len(told) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_batches_on_the_gpu_are_those_of_the_cpu(posterior, name):
    """A slot must not be filled again while its copy is under way."""
    device = torch.device(name)
    if (device.index or 0) >= torch.cuda.device_count():
        pytest.skip("one GPU only")
    wanted = take(open_loader(posterior, batch_size=6), 60)
    batches = iter(open_loader(posterior, batch_size=6, threads=4, device=device))
    kept = [next(batches) for _ in range(60)]  # as fast as they come, all of them kept
    batches.close()
    torch.cuda.synchronize()
    for batch, same in zip(kept, wanted, strict=True):
        assert batch.latents.device.type == "cuda"
        assert equal(joined([batch.to(torch.device("cpu"))]), joined([same]))
