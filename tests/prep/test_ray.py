"""The Ray engine writes what the local one writes, even when a node dies under it; so do parts."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.support.sources import captioned, encode, manifest, prep, refusal, tree, units, write_tar

RAY_FLAGS = ["--engine", "ray", "--cpus-per-worker", 1]


@pytest.fixture
def cluster(ray):
    """A head without CPUs and two nodes with one each."""
    node = {"include_dashboard": False, "object_store_memory": 1 << 27}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **node})
    cluster.nodes = [cluster.add_node(num_cpus=1, **node) for _ in range(2)]
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def tars(tmp_path):
    return [write_tar(tmp_path / f"{n}.tar", captioned(range(8 * n, 8 * n + 8))) for n in range(6)]


def words(tars, *more):
    return ["--shards", *tars, "--model", "tiny-sd", "--latents", "mean", "--threads", 1, *more]


def after_first_unit(cache: Path, act) -> threading.Thread:
    """Call `act` as soon as the cache has a unit, while others are being encoded."""

    def wait() -> None:
        while not list((cache / "units").glob("*.json")):
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def same(cache: Path, wanted: Path) -> None:
    """The caches are equal but for what dead workers left in tmp/, and for their manifests."""
    for folder in ("shards", "samples", "units"):
        assert tree(cache / folder) == tree(wanted / folder)


def kill_workers() -> int:
    """SIGKILL to all our workers below this process, not Ray's own; returns how many there were."""
    below = psutil.Process().children(recursive=True)
    workers = [process for process in below if process.name().startswith("ray::Worker")]
    for worker in workers:
        worker.kill()
    return len(workers)


@pytest.mark.slow
def test_a_node_killed_while_encoding_changes_nothing(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths hold in workers, whose nodes started elsewhere
    names = [f"{n}.tar" for n in range(8)]  # enough work to be in the middle of when a node dies
    for n, name in enumerate(names):
        write_tar(tmp_path / name, captioned(range(200 * n, 200 * n + 200)))
    wanted = encode(names, tmp_path / "local")
    cache = tmp_path / "cache"
    killer = after_first_unit(
        cache, lambda: cluster.remove_node(cluster.nodes[0], allow_graceful=False)
    )
    answer = prep(
        "encode", "--cache", "cache", *words(names, *RAY_FLAGS, "--ray-address", cluster.address)
    )
    assert answer.status == 0, answer.err
    killer.join(60)
    assert not killer.is_alive()
    assert "lost a worker in" in answer.err
    same(cache, wanted)
    assert len(units(cache)) == 8


@pytest.mark.slow
def test_killed_workers_come_back(ray, tars, tmp_path, capfd):
    """Of all workers of one machine, so that nobody else could take their units."""
    wanted = encode(tars, tmp_path / "local")
    killed = []
    killer = after_first_unit(tmp_path / "c", lambda: killed.append(kill_workers()))
    answer = prep("encode", "--cache", tmp_path / "c", *words(tars, *RAY_FLAGS))
    killer.join(60)
    assert answer.status == 0, answer.err
    assert killed[0] > 0
    assert "lost a worker in" in answer.err
    assert "core_worker" not in capfd.readouterr().err  # Ray has its own ways to stderr
    assert "48 pictures and 48 captions encoded" in answer.out
    same(tmp_path / "c", wanted)
    assert (tmp_path / "c/manifest.json").read_bytes() == (wanted / "manifest.json").read_bytes()


# A machine on which the package is not installed, or whose workers die as they begin.
WORKERS_FAIL = {
    "without the package": """
import sys
class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("prep", "shared"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
if any("default_worker" in word for word in sys.orig_argv):
    sys.meta_path.insert(0, Missing())
""",
    "killed while loading": """
import os, sys
class Killer:
    def find_spec(self, name, *_):
        if name == "prep.engines.ray_cluster":
            os.kill(os.getpid(), 9)
if any("default_worker" in word for word in sys.orig_argv):
    sys.meta_path.insert(0, Killer())
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", WORKERS_FAIL)
def test_workers_that_never_get_ready_end_the_command(ray, tars, tmp_path, monkeypatch, how):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WORKERS_FAIL[how])
    monkeypatch.setenv("PYTHONPATH", f"{site}:{os.environ['PYTHONPATH']}")
    line = refusal("encode", "--cache", tmp_path / "c", *words(tars[:1], *RAY_FLAGS))
    assert line.startswith("no Ray worker gets ready: ")
    if how == "without the package":
        assert "No module named 'prep'" in line
    assert line.endswith("a worker memory for the networks")


@pytest.mark.slow
def test_sigterm_while_workers_encode(ray, tars, tmp_path):
    """Ray has a handler of its own, and turns what ours raises into a KeyboardInterrupt."""
    before = signal.getsignal(signal.SIGTERM)
    after_first_unit(tmp_path / "c", lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        answer = prep("encode", "--cache", tmp_path / "c", *words(tars, *RAY_FLAGS))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert answer.status == 143, answer.err
    assert answer.err.splitlines()[-1].startswith("interrupted: what was committed is safe")


@pytest.mark.slow
def test_what_a_worker_refuses_ends_the_command(ray, tmp_path):
    files = [("a.png", b"no picture"), ("a.txt", b"a"), *captioned([1])]
    bad = write_tar(tmp_path / "bad.tar", files)
    line = refusal(
        "encode", "--cache", tmp_path / "c",
        *words([bad], *RAY_FLAGS, "--max-reject-fraction", 0.1),
    )  # fmt: skip
    assert line.startswith(f"{bad}: 1 of 2 rows rejected")


@pytest.mark.slow
def test_workers_overwrite(ray, tars, tmp_path):
    cache = encode(tars[:2], tmp_path / "c")
    more = words(tars[:2], *RAY_FLAGS, "--resolution", 48, "--overwrite")
    answer = prep("encode", "--cache", cache, *more)
    assert answer.status == 0, answer.err
    wanted = encode(tars[:2], tmp_path / "local", resolution=48)
    assert {unit["generation"] for unit in units(cache).values()} == {1}
    assert tree(wanted / "shards").items() <= tree(cache / "shards").items()
    assert manifest(cache)["shards"] == manifest(wanted)["shards"]


DEADLY = """
for pid in $PPID $(cut -d' ' -f4 /proc/$PPID/stat); do
    case $(cat /proc/$pid/comm) in ray::*) kill -9 $pid ;; esac
done
cat "$(dirname "$0")/0.tar"
"""


@pytest.mark.slow
def test_a_unit_that_every_worker_dies_of_ends_the_command_and_is_named(ray, tars, tmp_path):
    """The source's own command kills whoever reads it, unless it is the one who was called."""
    (tmp_path / "deadly.sh").write_text(DEADLY)
    source = f"pipe:sh {tmp_path}/deadly.sh"
    line = refusal("encode", "--cache", tmp_path / "c", *words([source, tars[1]], *RAY_FLAGS))
    assert line.startswith(f"{source}: 5 workers died of it (the last: ")
    assert line.endswith("give a worker more memory, or see what --engine local says of it")
    assert len(units(tmp_path / "c")) <= 1  # the other source may have been encoded meanwhile


@pytest.mark.slow
def test_workers_that_do_not_see_the_cache_refuse(ray, tars, tmp_path, monkeypatch):
    """One machine sees it or does not, so the command is made to go on without creating it."""
    monkeypatch.setattr("prep.commands.claim", lambda *_: True)
    line = refusal("encode", "--cache", tmp_path / "c", *words(tars[:1], *RAY_FLAGS))
    assert f"{socket.gethostname()} does not see {tmp_path / 'c' / 'identity.json'}" in line
    assert line.endswith("must be on a file system that all workers see")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_wrong_address_is_refused_at_once(ray, address, tars, tmp_path):
    start = time.monotonic()
    line = refusal(
        "encode", "--cache", tmp_path / "c", *words(tars, *RAY_FLAGS, "--ray-address", address)
    )
    assert f"--ray-address {address}: no cluster to join there" in line
    assert time.monotonic() - start < 30  # Ray alone would try for a minute


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
    from prep.encode.writer import UnitWriter

    commit = UnitWriter.commit

    def then_terminate(self, *args):
        record = commit(self, *args)
        os.kill(os.getpid(), signal.SIGTERM)
        return record

    before = signal.getsignal(signal.SIGTERM)
    words = ["--shards", *tars[:2], "--model", "tiny-sd", "--latents", "mean", "--threads", 1]
    with monkeypatch.context() as patch:
        patch.setattr(UnitWriter, "commit", then_terminate)
        answer = prep("encode", "--cache", tmp_path / "c", *words)
    assert signal.getsignal(signal.SIGTERM) == before
    assert answer.status == 143
    assert "what was committed is safe" in answer.err
    assert len(units(tmp_path / "c")) == 1
    assert prep("encode", "--cache", tmp_path / "c", *words).status == 0
    assert tree(tmp_path / "c" / "shards") == tree(encode(tars[:2], tmp_path / "w") / "shards")
