"""Stages that run at the same time: in order, bounded, and over as soon as one of them fails."""

import gc
import itertools
import threading
import time
import tracemalloc

import pytest

import prep.encode.engine
from prep.encode import captions, decode_rows, latents, prefetch, writer
from prep.encode.prefetch import map_ahead
from shared.errors import UserError
from tests.support.sources import accounts, captioned, encode, samples, tree, write_tar

OURS = ("read", "decode", "write", "captions")


def ours():
    """The pipeline's threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(OURS)]


def counting(taken, closed):
    """0, 1, 2, ... and a note of what was taken, and of the end."""
    try:
        for number in itertools.count():
            taken.append(number)
            yield number
    finally:
        closed.append(threading.current_thread().name)


def test_the_order_is_kept_whatever_takes_how_long():
    def slow_if_even(number):
        time.sleep(0.01 * (number % 2 == 0))
        return number

    read = prefetch.prefetch((number for number in range(40)), 3)
    assert list(map_ahead(slow_if_even, read, 4, 8, "decode")) == list(range(40))
    assert ours() == []


@pytest.mark.parametrize("take", [0, 1, 5])
def test_no_more_is_read_than_may_wait_and_an_early_end_closes_the_source(take):
    taken, closed = [], []
    read = prefetch.prefetch(counting(taken, closed), 3)
    assert list(itertools.islice(read, take)) == list(range(take))
    time.sleep(0.2)
    assert len(taken) <= take + 3 + 1  # those that wait, and one in hand
    began = time.monotonic()
    read.close()
    assert time.monotonic() - began < 1
    assert closed == (["read"] if take else [])  # in its own thread; what never began has no end
    assert ours() == []


def test_an_error_comes_after_what_was_read_before_it_and_once():
    def failing():
        yield from range(5)
        raise UserError("the disk is on fire")

    read = prefetch.prefetch(failing(), 2)
    assert list(itertools.islice(read, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="on fire"):
        next(read)
    assert list(read) == []
    assert ours() == []


def test_a_source_that_hangs_is_left_behind(monkeypatch):
    monkeypatch.setattr(prefetch, "PATIENCE", 0.2)
    go_on = threading.Event()

    def hanging():
        yield 1
        go_on.wait()

    read = prefetch.prefetch(hanging(), 2)
    assert next(read) == 1
    began = time.monotonic()
    read.close()
    assert time.monotonic() - began < 1
    go_on.set()


SMALL_BATCHES = {"vae_batch_size": 2, "text_batch_size": 2}


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    return write_tar(tmp_path_factory.mktemp("pictures") / "a.tar", captioned(range(40)))


@pytest.fixture(scope="module")
def undisturbed(tar, tmp_path_factory):
    """The bytes of its cache, by small batches."""
    return tree(encode(tar, tmp_path_factory.mktemp("undisturbed") / "cache", **SMALL_BATCHES))


@pytest.mark.parametrize("stage", ["reading", "decoding", "captions", "latents", "writing"])
def test_what_any_stage_raises_reaches_the_caller(stage, tar, undisturbed, tmp_path, monkeypatch):
    """With no thread and no file left behind, and the next run makes it good."""
    place, name = {
        "reading": (prep.encode.engine.Unit, "rows"),
        "decoding": (decode_rows, "prepare"),
        "captions": (captions.CaptionMemo, "encode"),
        "latents": (latents, "finish"),
        "writing": (writer.Spool, "add"),
    }[stage]
    real, calls = getattr(place, name), itertools.count()
    # The probe reads some rows and prepares their pictures first.
    last = {"reading": 1, "decoding": 20}.get(stage, 9)

    def failing(*args, **options):
        if next(calls) < last:
            return real(*args, **options)
        if stage == "reading":
            return failing_rows(real(*args))
        raise OSError(5, "no luck")

    def failing_rows(rows):
        yield from itertools.islice(rows, 9)
        raise OSError(5, "no luck")

    cache = tmp_path / "cache"
    monkeypatch.setattr(place, name, failing)
    with pytest.raises(OSError, match="no luck"):
        encode(tar, cache, **SMALL_BATCHES)
    monkeypatch.setattr(place, name, real)
    assert ours() == []
    assert list((cache / "tmp").iterdir()) == []
    assert not list(cache.glob("units/*"))
    assert tree(encode(tar, cache, **SMALL_BATCHES)) == undisturbed


def test_an_interrupted_run_leaves_no_thread_and_no_file(tar, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    cache = tmp_path / "cache"
    monkeypatch.setattr(latents, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(tar, cache)
    assert ours() == []
    assert list((cache / "tmp").iterdir()) == []


@pytest.mark.slow
def test_a_row_costs_few_bytes_until_the_unit_is_committed(tmp_path, monkeypatch):
    """Python's share: what Arrow and NumPy hold of a row is its account and its sums."""
    held = {}
    real = writer.UnitWriter.commit

    def commit(self, *args):
        gc.collect()
        held[self.read] = tracemalloc.get_traced_memory()[0]
        return real(self, *args)

    monkeypatch.setattr(writer.UnitWriter, "commit", commit)
    flags = {"vae_batch_size": 8, "text_batch_size": 8}
    small = write_tar(tmp_path / "small.tar", captioned(range(20)))
    large = write_tar(tmp_path / "large.tar", captioned(range(20)) * 11)
    encode(small, tmp_path / "warm", **flags)
    tracemalloc.start()
    try:
        encode(small, tmp_path / "once", **flags)
        encode(large, tmp_path / "more", **flags)
    finally:
        tracemalloc.stop()
    assert sorted(held) == [20, 220]
    assert (held[220] - held[20]) / 200 < 600


def test_the_accounts_are_those_of_rows_in_any_number_of_chunks(tar, tmp_path):
    one = encode(tar, tmp_path / "one", text_batch_size=64)
    many = encode(tar, tmp_path / "many", text_batch_size=3, vae_batch_size=3)
    assert accounts(one) == accounts(many)
    assert len(samples(many)) == 40
