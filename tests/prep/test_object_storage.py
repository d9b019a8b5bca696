"""Caches on S3: the bytes of a local one whatever fails, and no source read for nothing."""

import os
import signal
import subprocess
import sys
from unittest.mock import ANY

import pytest

from shared.cache.conditioning import load_conditioning
from shared.cache.manifest import open_manifest
from shared.storage import retry
from shared.storage.urls import place
from tests.support.s3 import bucket, forget, objects, serving
from tests.support.sources import captioned, prep, refusal, tree, write_tar

SOURCES = "s3://bucket/source/{a,b}.tar"


@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture
def url(server, request, tmp_path):
    """The URL of a cache that is not there yet; two sources lie in the bucket."""
    server.calm()
    put_sources(tmp_path, a=range(8), b=range(8, 14))
    yield f"s3://bucket/caches/{request.node.name}"
    server.calm()


def put_sources(folder, **numbers):
    for name, some in numbers.items():
        tar = write_tar(folder / f"{name}.tar", captioned(some))
        bucket().put_file(str(tar), f"bucket/source/{name}.tar")


def words(cache, *more):
    flags = f"--shards {SOURCES} --model tiny-sd --threads 1 --latents mean --no-report"
    return ["encode", "--cache", str(cache), *flags.split(), *more]


def encode(cache, *more):
    answer = prep(*words(cache, *more))
    assert answer.status == 0, answer.err
    return answer.out


@pytest.fixture(scope="module")
def local(server, tmp_path_factory):
    """What a local cache of the sources holds."""
    folder = tmp_path_factory.mktemp("local")
    put_sources(folder, a=range(8), b=range(8, 14))
    encode(folder / "cache")
    return tree(folder / "cache")


def bodies(server):
    """Requests for the contents of sources."""
    return server.count("GET", "/bucket/source/")


def test_the_bytes_are_those_of_a_local_cache_and_a_second_run_reads_no_source(
    url, local, server, tmp_path
):
    assert "14 pictures and 14 captions encoded" in encode(url)
    assert objects(url) == local
    server.calm()
    assert "nothing had to be encoded" in encode(url)
    assert objects(url) == local
    assert bodies(server) == 0
    assert [path for path in server.log if path[0] == "PUT"] == [
        ("PUT", f"/{url.removeprefix('s3://')}/manifest.json")
    ]
    assert [path.name for path in tmp_path.glob("distillery-*/*")] == []  # the scratch is empty


@pytest.mark.slow
def test_a_changed_source_is_encoded_incrementally_and_gc_removes_the_rest(url, server, tmp_path):
    encode(url)
    put_sources(tmp_path, b=[*range(8, 14), 20])
    server.calm()
    assert "1 picture and 1 caption encoded" in encode(url)
    assert server.count("GET", "/bucket/source/a.tar") == 0
    encode(tmp_path / "cache")
    before = objects(url)
    wanted = tree(tmp_path / "cache")
    assert set(before) - set(wanted) == {name for name in before if name not in wanted} != set()
    assert "2 files and 0 strays" in prep("gc", "--cache", url, "--all").out
    assert objects(url) == wanted


def test_every_command_takes_the_url(url, local, tmp_path):
    encode(url, "--part", "0/2")
    assert f"{url}: unfinished" in prep("stats", "--cache", url).out
    encode(url, "--part", "1/2")
    assert prep("finish", "--cache", url, "--no-report").status == 0
    assert objects(url) == local
    assert "no damage" in prep("verify", "--cache", url, "--reencode", 3).out
    assert f"{url}: complete" in prep("stats", "--cache", url).out
    sheet = tmp_path / "sheet.png"
    assert prep("decode", "--cache", url, "--output", sheet, "--count", 2).status == 0
    assert sheet.stat().st_size > 1000
    assert prep("report", "--cache", url).status == 0
    assert url.rpartition("/")[2] in bucket().cat_file(f"{url}/report.html").decode()
    assert prep("pack", "--cache", url, "--output", tmp_path / "archive").status == 0
    other = f"{url}-unpacked"
    assert prep("unpack", "--cache", other, "--input", tmp_path / "archive").status == 0
    assert objects(other) == local
    assert prep("embed", "--cache", url, "--prompts", "a red fox").status == 0
    assert "a red fox" in load_conditioning(place(url) / "conditioning.safetensors").prompts
    assert open_manifest(place(url)).totals.written == 14


def test_damage_is_found_and_mended(url, local):
    encode(url)
    (shard,) = (name for name in objects(url) if name.startswith("shards/a"))
    content = bytearray(bucket().cat_file(f"{url}/{shard}"))
    content[3000] ^= 1
    bucket().pipe_file(f"{url}/{shard}", bytes(content))
    answer = prep("verify", "--cache", url, "--repair")
    assert answer.status == 1
    assert "sha256 differs" in answer.err
    assert "is unfinished" in refusal("verify", "--cache", url)
    encode(url)
    assert objects(url) == local


def test_failing_requests_cost_nothing(url, local, server):
    server.every = 4
    encode(url)
    assert set(server.failed) >= {"HEAD", "GET", "PUT"}
    server.every = 0
    assert objects(url) == local


def test_mistakes_are_one_line(url, server, monkeypatch):
    line = refusal(*words("s3://nowhere/cache"))
    assert line.startswith("s3://nowhere/cache/")
    assert "bucket does not exist" in line
    for status in (403, 500):
        server.refuses = status
        line = refusal("stats", "--cache", url)
        assert line.startswith(f"{url}/identity.json cannot be reached (")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget()
    assert "Unable to locate credentials" in refusal("stats", "--cache", url)
    forget()


def test_little_room_for_the_scratch_is_told(url, tmp_path, monkeypatch):
    monkeypatch.setattr("shared.cache.paths.free_bytes", lambda folder: 1000)
    line = refusal(*words(url))
    assert line.startswith(f"{tmp_path}/distillery-")
    assert line.endswith("free some space or set TMPDIR to a folder with more")


SMALL_PARTS = """
import sys, s3fs.core
s3fs.core.calculate_chunksize = lambda *words, **options: 20_000
from prep.__main__ import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("parts", [False, True])
def test_a_process_killed_while_it_uploads_leaves_the_cache_as_it_was(
    url, server, tmp_path, repo, monkeypatch, parts
):
    """In the middle of a shard's only request, or (in parts) of the second of several."""
    monkeypatch.setattr("moto.settings.S3_UPLOAD_PART_MIN_SIZE", 1)
    encode(url)
    before, manifest = objects(url), open_manifest(place(url))
    put_sources(tmp_path, a=range(30, 42))
    wanted = "partNumber=2" if parts else "/shards/"
    server.hold = lambda method, path: method == "PUT" and wanted in path
    start = ["-c", SMALL_PARTS] if parts else ["-m", "prep"]
    environment = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *start, *words(url)], cwd=tmp_path, env=environment,
        stdout=subprocess.DEVNULL, stderr=(tmp_path / "log").open("w"),
    )  # fmt: skip
    assert server.held.wait(timeout=100), (tmp_path / "log").read_text()
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.calm()
    server.held.clear()
    assert objects(url) == before
    assert open_manifest(place(url)) == manifest
    encode(url)
    prep("gc", "--cache", url, "--all")
    encode(tmp_path / "cache")
    prompts = {"conditioning.safetensors": ANY}  # those of the first pictures stay
    assert objects(url) | prompts == tree(tmp_path / "cache")
    assert [path.name for path in tmp_path.glob("distillery-*/*")] == []  # strays are swept


@pytest.mark.slow
def test_ray_workers_write_the_same_bytes(url, local, ray):
    encode(url, "--engine", "ray", "--cpus-per-worker", "1")
    assert objects(url) == local
