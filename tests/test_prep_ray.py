"""The Ray engine writes what the local one writes, even when a node dies under it."""

import os
import signal
import threading
import time

import pytest
from support_prep import captioned, encode, prep, refusal, shards, tree, units, write_tar

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """Ray without its tokens and usage reports, at home in the test's folder."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    ray.shutdown()


@pytest.fixture
def tars(tmp_path):
    return [write_tar(tmp_path / f"{n}.tar", captioned(range(8 * n, 8 * n + 8))) for n in range(6)]


@pytest.mark.slow
def test_a_node_killed_while_encoding_changes_nothing(quiet, tars, tmp_path):
    wanted = encode(tars, tmp_path / "local")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cache = tmp_path / "cache"

    def kill_one_after_its_first_unit():
        while not list((cache / "units").glob("*.json")):
            time.sleep(0.02)
        cluster.remove_node(nodes[0], allow_graceful=False)

    killer = threading.Thread(target=kill_one_after_its_first_unit)
    killer.start()
    try:
        encode(tars, cache, engine="ray", ray_address=cluster.address, cpus_per_worker=1)
    finally:
        killer.join()
        ray.shutdown()
        cluster.shutdown()
    assert tree(cache / "shards") == tree(wanted / "shards")
    assert units(cache) == units(wanted)


@pytest.mark.slow
def test_ray_on_one_machine(quiet, tars, tmp_path):
    wanted = encode(tars[:2], tmp_path / "local")
    words = ["--shards", *tars[:2], "--model", "tiny-sd", "--latents", "mean", "--engine", "ray"]
    answer = prep("encode", "--cache", tmp_path / "c", *words, "--cpus-per-worker", 1)
    assert answer.status == 0, answer.err
    assert [p.name for p in shards(tmp_path / "c")] == [p.name for p in shards(wanted)]
    assert "16 pictures and 16 captions encoded" in answer.out
    # What a worker refuses is said in one line, as by the local engine.
    bad = write_tar(
        tmp_path / "bad.tar", [("a.png", b"no picture"), ("a.txt", b"a"), *captioned([1])]
    )
    words[1:3] = [bad]
    line = refusal("encode", "--cache", tmp_path / "d", *words, "--max-reject-fraction", 0.1)
    assert "1 of 2 rows rejected" in line
    words += ["--ray-address", "127.0.0.1:1"]
    assert "--ray-address 127.0.0.1:1" in refusal("encode", "--cache", tmp_path / "e", *words)


def test_parts_add_up_to_the_whole(tars, tmp_path):
    wanted = encode(tars, tmp_path / "whole")
    words = ["--shards", *tars, "--model", "tiny-sd", "--latents", "mean", "--threads", 1]
    cache = tmp_path / "cache"
    for part in (2, 0, 1):
        answer = prep("encode", "--cache", cache, *words, "--part", f"{part}/3")
        assert answer.status == 0, answer.err
        assert f"after the last: prep finish --cache {cache}" in answer.out
    assert not (cache / "manifest.json").exists()
    assert prep("finish", "--cache", cache).status == 0
    assert tree(cache / "shards") == tree(wanted / "shards")
    assert (cache / "manifest.json").read_bytes() == (wanted / "manifest.json").read_bytes()


@pytest.mark.parametrize("part", ["3/3", "1", "a/b", "-1/2", "1/0"])
def test_a_part_that_is_none_is_refused(part, tars, tmp_path):
    words = ["--shards", *tars, "--model", "tiny-sd", "--cache", tmp_path / "c", "--part", part]
    assert "is not I/N" in refusal("encode", *words)


def test_sigterm_ends_it_in_one_line_and_the_next_run_goes_on(tars, tmp_path, monkeypatch):
    from prep.writer import UnitWriter

    commit = UnitWriter.commit

    def then_terminate(self, fraction):
        record = commit(self, fraction)
        os.kill(os.getpid(), signal.SIGTERM)
        return record

    before = signal.getsignal(signal.SIGTERM)
    words = ["--shards", *tars[:2], "--model", "tiny-sd", "--latents", "mean", "--threads", 1]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(UnitWriter, "commit", then_terminate)
            answer = prep("encode", "--cache", tmp_path / "c", *words)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert answer.status == 143
    assert "what was committed is safe" in answer.err
    assert len(units(tmp_path / "c")) == 1
    assert prep("encode", "--cache", tmp_path / "c", *words).status == 0
    assert tree(tmp_path / "c" / "shards") == tree(encode(tars[:2], tmp_path / "w") / "shards")
