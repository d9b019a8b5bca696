"""`prep teach` on object storage and on a Ray cluster: the bytes are the same."""

import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.support.s3 import bucket, forget, objects, serving
from tests.support.sources import captioned, encode, prep, tree, write_tar

FLAGS = ["--answers", 2, "--threads", 1, "--batch-size", 4]


def teach(cache, *words):
    answer = prep("teach", "--cache", cache, *FLAGS, *words)
    assert answer.status == 0, answer.err
    return answer


def tars(folder, units, pictures):
    numbers = (range(pictures * n, pictures * (n + 1)) for n in range(units))
    return [write_tar(folder / f"{n}.tar", captioned(some)) for n, some in enumerate(numbers)]


def put(cache: Path, url: str) -> None:
    """The same cache, behind a URL."""
    for path in cache.rglob("*"):
        if path.is_file():
            bucket().put_file(str(path), f"{url.removeprefix('s3://')}/{path.relative_to(cache)}")


@pytest.mark.slow
def test_a_cache_behind_a_url(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache, url = encode(tars(tmp_path, 2, 5), tmp_path / "cache"), "s3://bucket/taught"
    with serving() as server:
        put(cache, url)
        forget()  # what other tests saw there
        teach(cache)
        assert "20 answers asked for" in teach(url).out
        forget()
        assert objects(url) == tree(cache)
        server.calm()
        assert "nothing had to be asked" in teach(url).out
        assert server.count("GET", "/bucket/taught/answers/shards/") == 0
        assert objects(url) == tree(cache)
        assert "no damage" in prep("verify", "--cache", url, "--reencode", 2).out


def kill_a_worker(cache: Path) -> threading.Thread:
    """SIGKILL to one of our workers below this process, once the cache has a unit's answers."""

    def wait() -> None:
        while not list((cache / "answers" / "units").glob("*.json")):
            time.sleep(0.01)
        below = psutil.Process().children(recursive=True)
        next(process for process in below if process.name().startswith("ray::Worker")).kill()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_of_two_workers_one_is_killed(ray, tmp_path):
    sources = tars(tmp_path, 8, 60)
    cache, wanted = (encode(sources, tmp_path / name) for name in ("cache", "wanted"))
    killer = kill_a_worker(cache)
    answer = teach(cache, "--engine", "ray", "--cpus-per-worker", 1)
    killer.join(60)
    assert not killer.is_alive()
    assert "lost a worker in" in answer.err
    teach(wanted)
    for folder in ("units", "shards"):
        assert tree(cache / "answers" / folder) == tree(wanted / "answers" / folder)
    manifests = [(one / "answers/manifest.json").read_bytes() for one in (cache, wanted)]
    assert manifests[0] == manifests[1]
