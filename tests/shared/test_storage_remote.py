"""Files behind URLs: whole or absent, fresh, and errors told in a line."""

import pickle
import time
from pathlib import Path

import fsspec
import pytest

from shared.cache.paths import CachePaths
from shared.cli.config import parse, to_dict
from shared.errors import UserError
from shared.storage import files, retry, urls
from shared.storage.errors import known_protocol
from shared.storage.urls import RemotePlace, place
from tests.support import warm
from tests.support.s3 import bucket, forget, serving
from train.config import DistillConfig, SampleConfig


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture
def root(server, request):
    server.calm()
    yield place(f"s3://bucket/{request.node.name}")
    server.calm()


@pytest.fixture
def memory():
    """The URL of an empty folder in fsspec's memory, which is no object storage."""
    fsspec.filesystem("memory").store.clear()
    yield "memory://bucket/cache"
    fsspec.filesystem("memory").store.clear()


def test_a_text_is_a_path_or_a_url(memory):
    assert place("caches/x") == Path("caches/x")
    assert place("file:///caches/x") == Path("/caches/x")
    found = place(f"{memory}/")
    assert isinstance(found, RemotePlace)
    assert str(found / "a/b.json") == f"{memory}/a/b.json"
    assert ((found / "a").parent, found.name) == (found, "cache")
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_publish_replaces_and_is_seen_at_once(kind, root, memory, tmp_path):
    root = root if kind == "s3" else place(memory)
    path = root / "units" / "a.json"
    assert not path.exists()
    assert files.file_sizes(root / "units") == {}
    for content in (b"old", b"content"):
        digest = files.publish([content[:2], content[2:]], path, tmp_path)
        assert path.read_bytes() == content
        assert path.stat().st_size == len(content)
        assert files.file_sizes(root / "units") == {"a.json": len(content)}
        assert files.file_sha256(path) == digest
    assert path.is_file()
    assert not (root / "units").is_file()
    assert [str(found) for found in (root / "units").glob("*.json")] == [str(path)]
    assert list(tmp_path.iterdir()) == []
    path.unlink()
    assert not path.exists()
    path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        path.read_bytes()


def test_a_file_is_read_by_the_range(root, server, tmp_path):
    content = bytes(range(256)) * 40
    path = root / "shard.tar"
    files.publish([content], path, tmp_path)
    server.calm()
    with path.open("rb", buffering=0) as file:
        file.seek(1000)
        assert file.read(24) == content[1000:1024]
        assert server.count("GET", "shard.tar") == 1
        assert server.count("HEAD", "shard.tar") == 0
        file.seek(-10, 2)
        assert file.read(100) == content[-10:]
        assert file.read(100) == b""  # which S3 answers with an error
    with path.open("rb", buffering=1000) as file:
        assert b"".join(iter(lambda: file.read(300), b"")) == content


CLAIM = """
import sys, time
from pathlib import Path
from shared.storage import files
from shared.storage.urls import place
path = place(sys.argv[1])
assert not path.exists()
here = Path(sys.argv[3])
(here / f"ready{sys.argv[2]}").touch()
while not (here / "go").exists():
    time.sleep(0.001)
print(files.create_exclusively(sys.argv[2].encode(), path, Path("unused")))
"""


def test_of_several_processes_one_creates_the_file(root, repo, tmp_path):
    path = root / "identity.json"
    started = [warm.start(["-c", CLAIM, path, n, tmp_path], repo) for n in range(2)]
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert not any(process.poll() for process in started)
        time.sleep(0.001)
    (tmp_path / "go").touch()
    won = [process.communicate()[0].strip() for process in started]
    assert sorted(won) == ["False", "True"]
    assert path.read_bytes() == str(won.index("True")).encode()
    assert files.create_exclusively(b"new", path, Path("unused")) is False


def test_without_conditional_writes_what_is_there_stays(memory, monkeypatch):
    path = place(memory) / "identity.json"
    assert files.create_exclusively(b"one", path, Path("unused")) is True
    assert files.create_exclusively(b"two", path, Path("unused")) is False
    assert path.read_bytes() == b"one"


def test_every_third_request_fails_and_nothing_is_lost(root, server, tmp_path):
    server.every = 3
    for number in range(4):
        path = root / f"{number}"
        assert not path.exists()
        files.publish([b"%d" % number], path, tmp_path)
        assert path.read_bytes() == b"%d" % number
    assert len(files.file_sizes(root)) == 4
    assert set(server.failed) == {"HEAD", "GET", "PUT"}


def message(act):
    with pytest.raises(UserError) as refusal:
        act()
    (line,) = str(refusal.value).splitlines()
    return line


@pytest.mark.parametrize("act", ["exists", "read_bytes", "upload", "sizes", "create"])
@pytest.mark.parametrize(("status", "cause"), [(500, "InternalError|500"), (403, "Denied|Forb")])
def test_a_server_that_refuses_is_named(root, server, tmp_path, act, status, cause):
    path = root / "file"
    acts = {
        "exists": path.exists,
        "read_bytes": path.read_bytes,
        "upload": lambda: files.publish([b"x"], path, tmp_path),
        "sizes": lambda: files.file_sizes(path),
        "create": lambda: path.create(b"x"),
    }
    server.refuses = status
    line = message(acts[act])
    assert line.startswith(f"{path} cannot be reached (")
    assert any(word in line for word in cause.split("|"))
    assert line.endswith("run the same command again")
    assert len(server.log) == (1 if status == 403 else urls.TRIES)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_bucket_and_no_credentials_are_told(root, tmp_path, monkeypatch):
    path = place("s3://nowhere/cache") / "file"
    for act in (path.exists, path.parent.file_sizes):
        assert "The specified bucket does not exist" in message(act)
    line = message(lambda: files.publish([b"x"], path, tmp_path))
    assert "The specified bucket does not exist" in line
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    forget()
    assert "Unable to locate credentials" in message(place("s3://bucket/x").exists)
    forget()


def test_urls_that_cannot_be_used_are_told():
    assert "names no bucket" in message(lambda: place("s3://"))
    assert "nope" in message(lambda: place("nope://x/y"))

    def without_s3fs():
        with known_protocol("s3://bucket/x"):
            raise ImportError("Install s3fs to access S3")

    line = message(without_s3fs)
    assert line == "s3:// needs another package: pip install latent-distillery[s3]"


def test_the_scratch_folder_is_local_and_one_for_each_url(tmp_path, monkeypatch, memory):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    a, b = CachePaths(place(memory)).tmp, CachePaths(place(f"{memory}2")).tmp
    assert a != b
    assert a.parent == b.parent == tmp_path
    assert CachePaths(place(memory)).tmp == a
    assert CachePaths(tmp_path).tmp == tmp_path / "tmp"


def test_flags_and_files_of_settings_take_urls(tmp_path, memory):
    words = ["--model", "m", "--run", "r"]
    config = parse(DistillConfig, [*words, "--cache", memory], "train")
    assert config.cache == place(memory)
    assert to_dict(config)["cache"] == str(place(memory))
    assert parse(DistillConfig, [*words, "--cache", "c"], "train").cache == Path("c")
    (tmp_path / "run.toml").write_text(f'cache = "{memory}"\n')
    toml = ["--config", str(tmp_path / "run.toml")]
    assert parse(DistillConfig, [*words, *toml], "train").cache == place(memory)
    wanted = parse(SampleConfig, ["--run", "r", "--prompt", "p", *toml], "train").cache
    assert wanted == place(memory)
    assert parse(SampleConfig, ["--run", "r", "--prompt", "p"], "train").cache is None


def test_the_bucket_holds_what_was_published_and_nothing_else(root, tmp_path):
    files.publish([b"x"], root / "a" / "b", tmp_path)
    assert bucket().find(root.path) == [f"{root.path}/a/b"]
