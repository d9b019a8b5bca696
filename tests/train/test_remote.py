"""Remote caches: the same batches as from a local one, whatever the network does."""

import http.server
import os
import threading
import uuid
from collections import Counter

import fsspec
import pytest
from upath import UPath

from shared.cache.manifest import open_manifest
from shared.errors import UserError
from shared.storage import retry
from tests.support.loader import equal, joined_by_size, make_cache, open_loader, take
from tests.support.web import serve
from train.data import remote
from train.data.bucket import open_buckets
from train.data.loader import Loader
from train.data.local_cache import LocalCache


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)


@pytest.fixture
def cache(tmp_path):
    """Two shards of 8 x 8 latents and one of 4 x 6, two views, up to three captions, SDXL."""
    return make_cache(tmp_path / "cache", [(7, 8, 8), (5, 4, 6), (9, 8, 8)])


@pytest.fixture
def memory(cache):
    """The cache in fsspec's memory."""
    root = f"/{uuid.uuid4().hex}"
    fs = fsspec.filesystem("memory")
    fs.put(str(cache), root, recursive=True)
    yield UPath(f"memory:/{root}")
    fs.rm(root, recursive=True)


def open_remote(cache, root, local_cache=None, **more) -> Loader:
    """A loader of the copy of `cache` at `root`."""
    local = open_loader(cache, **more)
    buckets = open_buckets(root, open_manifest(cache), local_cache)
    return Loader(buckets, local.order, local.spec, local.latents, local.unconditional)


def same(loader: Loader, cache, count=12) -> bool:
    pairs = zip(take(loader, count), take(open_loader(cache), count), strict=True)
    return all(equal(*joined_by_size(list(pair))) for pair in pairs)


def test_the_same_batches_as_from_a_local_cache(cache, memory):
    assert same(open_remote(cache, memory), cache)


def test_only_the_view_and_the_caption_are_read(cache, memory, monkeypatch):
    asked = Counter()
    real = memory.fs.cat_ranges

    def watching(paths, starts, ends, **options):
        asked["bytes"] += sum(end - start for start, end in zip(starts, ends, strict=True))
        asked["samples"] += len(paths)
        return real(paths, starts, ends, **options)

    monkeypatch.setattr(memory.fs, "cat_ranges", watching)
    loader = open_remote(cache, memory)
    loader.buckets = [bucket for bucket in loader.buckets if bucket.layout.latent_size == (8, 8)]
    bucket = loader.buckets[0]
    into = bytearray(2 * 4 * 2 * 8 * 8)
    bucket.finish(bucket.start(bucket.spans(3, (("latents", 1),), [memoryview(into)])))
    assert asked == {"bytes": len(into), "samples": 1}


# ---- A server that fails.


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges, and fails as it is told."""

    daemon_threads = True
    request_queue_size = 128  # with 5, a sixth connection at once waits a second for its turn

    def __init__(self, folder):
        self.folder, self.faults, self.requests = folder, [], Counter()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests[self.path] += 1
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        if isinstance(fault, threading.Event):
            fault.wait(5)
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if fault == "break off" else part)
        return None

    def log_message(self, *words):
        pass


@pytest.fixture
def server(cache):
    with Server(cache) as server:
        serve(server)
        yield server
        server.shutdown()


@pytest.mark.parametrize("fault", [500, 503, "break off"])
def test_what_fails_is_asked_for_again(cache, server, fault):
    server.faults = [fault, None, fault, None, None, fault] * 3
    assert same(open_remote(cache, UPath(server.url)), cache, 4)
    assert not server.faults


def test_a_server_that_hangs_is_asked_again(cache, server, monkeypatch, capsys):
    monkeypatch.setattr(remote, "TIMEOUT", 2.0)  # which no healthy answer takes
    hung = threading.Event()
    server.faults = [hung]
    assert same(open_remote(cache, UPath(server.url)), cache, 2)
    hung.set()


def test_a_server_that_does_not_recover_ends_in_one_line(cache, server):
    loader = open_remote(cache, UPath(server.url))
    server.faults = [500] * 100_000
    with pytest.raises(UserError, match=r"unit\d\.tar sample \d: 500.* in 6 attempts; check the"):
        take(loader, 1)


def test_a_shard_that_is_gone_is_not_asked_for_again(cache, server):
    (cache / "shards/unit2.tar").rename(cache / "elsewhere")
    manifest = open_manifest(cache, check_sizes=False)
    bucket = open_buckets(UPath(server.url), manifest)[1]
    with pytest.raises(UserError, match=r"unit2\.tar sample 8: .*; is the cache complete\?"):
        bucket.record(15)
    assert server.requests == {"/shards/unit2.tar": 1}


def test_a_shard_that_was_cut(cache, memory):
    path = memory / "shards/unit2.tar"
    path.write_bytes(path.read_bytes()[:-20_000])
    bucket = open_buckets(memory, open_manifest(cache))[1]
    with pytest.raises(UserError, match=r"unit2\.tar sample 8: \d+ bytes came where \d+ were"):
        bucket.record(15)


def test_object_storage(cache, monkeypatch):
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    for name, value in (
        ("ACCESS_KEY_ID", "x"),
        ("SECRET_ACCESS_KEY", "y"),
        ("REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    try:
        host, port = server.get_host_and_port()
        root = UPath(f"s3://bucket-{uuid.uuid4().hex}/cache", endpoint_url=f"http://{host}:{port}")
        root.fs.mkdir(root.parts[0].strip("/"))
        root.fs.put(str(cache) + "/", root.path + "/", recursive=True)
        assert same(open_remote(cache, root), cache, 6)
    finally:
        server.stop()


# ---- The local cache.


@pytest.fixture
def requests(memory, monkeypatch):
    """Counts the ranges that are asked for."""
    counts, real = Counter(), memory.fs.cat_ranges

    def counting(paths, starts, ends, **options):
        for path, start in zip(paths, starts, strict=True):
            counts[path, start] += 1
        return real(paths, starts, ends, **options)

    monkeypatch.setattr(memory.fs, "cat_ranges", counting)
    return counts


def test_what_was_read_is_not_read_again(cache, memory, requests, tmp_path, capsys):
    for _ in range(2):
        assert same(open_remote(cache, memory, tmp_path / "kept"), cache, 12)
    # 21 samples; threads that ask at the same moment may fetch one twice, the second run none.
    first = sum(requests.values())
    assert len(requests) == 21
    assert same(open_remote(cache, memory, tmp_path / "kept"), cache, 12)
    assert sum(requests.values()) == first
    said = [line for line in capsys.readouterr().err.splitlines() if "local cache" in line]
    assert len(said) == 3
    assert said[0].startswith(f"local cache {tmp_path / 'kept'}: up to 156.7 kB, 0 bytes of them")


def shas(cache):
    return {s.sha256: s for s in open_manifest(cache).shards}


def test_files_are_named_by_content_and_hold_it(cache, memory, tmp_path):
    take(open_remote(cache, memory, tmp_path / "kept"), 12)
    for path in (tmp_path / "kept").iterdir():
        shard = shas(cache)[path.name.removesuffix(".samples")]
        content, original = path.read_bytes(), (cache / shard.file).read_bytes()
        assert content[shard.size :] == b"\1" * shard.count
        data = content[: shard.size - 1024]
        assert data == original[: shard.size - 1024]


def test_samples_that_were_not_marked_are_not_believed(cache, memory, requests, tmp_path):
    """As after a crash between the writing of the bytes and that of the mark."""
    take(open_remote(cache, memory, tmp_path / "kept"), 12)
    for path in (tmp_path / "kept").iterdir():
        shard = shas(cache)[path.name.removesuffix(".samples")]
        with path.open("r+b") as file:
            file.write(b"\0" * shard.size)  # nothing of it survived
            file.write(b"\0" * shard.count)
    requests.clear()
    assert same(open_remote(cache, memory, tmp_path / "kept"), cache, 12)
    assert len(requests) == 21


def test_bytes_are_synced_before_their_mark(tmp_path, cache, monkeypatch):
    """The order that makes a power cut harmless."""
    calls = []
    real = {name: getattr(os, name) for name in ("pwrite", "fdatasync")}

    def watch(name):
        def call(fd, *args):
            calls.append((name, len(args[0]) if args else 0))
            return real[name](fd, *args)

        monkeypatch.setattr(os, name, call)

    shard = open_manifest(cache).shards[0]
    stride = open_manifest(cache).layouts[0].stride
    kept = LocalCache(tmp_path / "kept")
    watch("pwrite")
    watch("fdatasync")
    kept.keep(shard, 3, bytearray(b"x" * stride))
    assert kept.holds(shard, 3)
    assert not LocalCache(tmp_path / "kept").holds(shard, 3)  # another process
    kept.sync()
    assert LocalCache(tmp_path / "kept").holds(shard, 3)
    assert not kept.holds(shard, 2)
    assert calls == [("pwrite", stride), ("fdatasync", 0), ("pwrite", 1)]


@pytest.mark.parametrize("failing", ["pwrite", "fdatasync"])
def test_a_full_disk_is_said_once_and_read_around(
    cache, memory, tmp_path, monkeypatch, capsys, failing
):
    real, calls = getattr(os, failing), Counter()

    def full(fd, *args):
        calls[failing] += 1
        if calls[failing] > (7 if failing == "pwrite" else 0):
            raise OSError(28, "No space left on device")
        return real(fd, *args)

    monkeypatch.setattr(os, failing, full)
    assert same(open_remote(cache, memory, tmp_path / "kept"), cache, 12)
    errors = capsys.readouterr().err
    assert errors.count("No space left on device; what is not there yet is read from afar") == 1
    monkeypatch.undo()
    assert same(open_remote(cache, memory, tmp_path / "kept"), cache, 12)


def test_a_local_cache_of_a_local_cache_is_refused(cache, tmp_path):
    with pytest.raises(UserError, match="--local-cache is for remote caches"):
        open_buckets(cache, open_manifest(cache), tmp_path / "kept")


def test_a_folder_that_cannot_be_is_refused(cache, memory, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory; choose another"):
        open_buckets(memory, open_manifest(cache), tmp_path / "file/kept")
