"""Sources behind URLs: found without reading them, read in spite of a bad connection."""

import pickle
import sys
from unittest import mock

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from prep.files import remote
from prep.sources.find import SourceError, SourceOptions, estimate_rows, find_units
from shared.errors import UserError
from shared.storage import retry
from tests.support.sources import (
    captioned,
    encode,
    manifest,
    png,
    prep,
    refusal,
    tree,
    units,
    write_tar,
)
from tests.support.web import Server, serve


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 20_000)  # several blocks in a small tar


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "source.tar", captioned(range(12))).read_bytes()


@pytest.fixture
def memory():
    """An empty bucket in fsspec's memory."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def keys_of(*shards, **options):
    found = pickle.loads(pickle.dumps(find_units(list(shards), SourceOptions(**options))))
    return [row.key for unit in found for row in unit.rows()]


KEYS = [f"{n:04d}" for n in range(12)]


@pytest.fixture
def server():
    with Server() as server:
        serve(server)
        yield server
        server.shutdown()


# --- any file system ----------------------------------------------------------------------------


def test_braces_globs_and_names(memory, tar, tmp_path):
    for number in range(3):
        memory.pipe(f"/bucket/{number:02d}.tar", tar)
    memory.pipe("/bucket/03.tar.zst", zstandard.compress(tar))
    assert keys_of("memory://bucket/{00..02}.tar") == 3 * KEYS
    assert keys_of("memory://bucket/*.tar") == 3 * KEYS
    assert keys_of("memory://bucket/0[01].tar", "memory://bucket/03.tar.zst") == 3 * KEYS
    local = write_tar(tmp_path / "local.tar", captioned([1]))
    assert len(find_units(["memory://bucket/00.tar", str(local), f"file://{local}"])) == 2


def test_an_unchanged_file_is_not_read_again(memory, tar, tmp_path):
    memory.pipe("/bucket/a.tar", tar)
    shards = "memory://bucket/a.tar"
    cache = encode(shards, tmp_path / "cache")
    before = tree(cache)
    (unit,) = units(cache).values()
    assert unit["source"] == shards
    with mock.patch.object(type(memory), "open", side_effect=AssertionError("read again")):
        words = ["--model", "tiny-sd", "--cache", cache, "--threads", 1]
        assert prep("encode", "--shards", shards, *words).status == 0
    assert tree(cache) == before
    memory.pipe("/bucket/a.tar", write_tar(tmp_path / "a.tar", captioned(range(3))).read_bytes())
    assert manifest(encode(shards, cache))["totals"]["written"] == 3


def test_many_names_are_looked_up_by_listing_their_folder(memory, tar):
    for number in range(100):
        memory.pipe(f"/bucket/{number:03d}.tar", b"x")
    info, real = [], type(memory).info
    counted = lambda self, path, **options: info.append(path) or real(self, path, **options)  # noqa: E731
    with mock.patch.object(type(memory), "info", counted):
        found = find_units(["memory://bucket/{000..099}.tar"])
        asked = len(info)
        alone = find_units(["memory://bucket/042.tar"])
    assert len(found) == 100
    assert asked < 5
    assert alone[0] in found  # the same state, whichever way it was asked
    with pytest.raises(UserError, match=r"memory://bucket/100\.tar"):
        find_units(["memory://bucket/{000..100}.tar"])


def test_remote_parquet(memory):
    rows = {"image": [png(n, 16, 16) for n in range(3)], "caption": ["a"] * 3, "id": list("xyz")}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(rows), sink, row_group_size=2)
    memory.pipe("/bucket/a.parquet", sink.getvalue().to_pybytes())
    assert keys_of("memory://bucket/a.parquet") == ["x", "y", "z"]


def test_rows_are_estimated_from_the_first_bytes(memory, tmp_path, monkeypatch):
    monkeypatch.setattr("prep.sources.tars.tar.SAMPLE_BYTES", 30_000)
    large = write_tar(tmp_path / "large.tar", captioned(range(40))).read_bytes()
    for name in "ab":
        memory.pipe(f"/bucket/{name}.tar", large)
    found = find_units(["memory://bucket/*.tar"])
    assert all(30 < rows < 50 for rows in estimate_rows(found).values())


def test_what_is_not_there_is_one_line(memory, tar, tmp_path, monkeypatch):
    memory.pipe("/bucket/a.tar", tar)
    memory.pipe("/bucket/empty.tar", b"")
    monkeypatch.setitem(sys.modules, "s3fs", None)  # not installed
    known = sys.modules["fsspec.registry"]._registry
    monkeypatch.delitem(known, "s3", raising=False)  # by another test that had it
    words = ["--model", "tiny-sd", "--cache", tmp_path / "c"]
    for shards, told in {
        "memory://bucket/b.tar": "memory://bucket/b.tar cannot be read (FileNotFoundError",
        "memory://bucket/*.tgz": "nothing matches 'memory://bucket/*.tgz'",
        "memory://bucket": "is a folder; name its files, such as memory://bucket/*.tar",
        "memory://bucket/empty.tar": "is empty",
        "s3://bucket/a.tar": "pip install latent-distillery[s3]",
        "s4://bucket/a.tar": "s4",
    }.items():
        assert told in refusal("encode", "--shards", shards, *words)
    assert not (tmp_path / "c").exists()


def test_a_cut_upload(memory, tar):
    memory.pipe("/bucket/a.tar", tar[: len(tar) // 2])
    with pytest.raises(SourceError, match=r"memory://bucket/a\.tar is not a whole tar"):
        keys_of("memory://bucket/a.tar")


# --- http ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tar", "a.tar.zst", "a.tar?token=x&n=[1]"])
def test_http(server, tar, tmp_path, name):
    path = name.partition("?")[0]
    server.files[f"/data/{path}"] = zstandard.compress(tar) if path.endswith("zst") else tar
    assert keys_of(f"{server.url}/data/{name}") == KEYS
    assert units(encode(f"{server.url}/data/{name}", tmp_path / "cache")).popitem()[0][:2] == "a-"


def test_http_listings_and_braces(server, tar):
    server.files |= {f"/data/{n}.tar": tar for n in range(3)}
    server.files["/data/"] = server.files["/data"] = b"".join(
        b'<a href="%d.tar">%d.tar</a>' % (n, n) for n in range(3)
    )
    assert keys_of(server.url + "/data/*.tar") == 3 * KEYS
    assert keys_of(server.url + "/data/{0..1}.tar") == 2 * KEYS
    by_glob = {unit.name: unit.state for unit in find_units([server.url + "/data/*.tar"])}
    by_name = {unit.name: unit.state for unit in find_units([server.url + "/data/{0..2}.tar"])}
    assert by_glob == by_name
    assert all(state["version"] for state in by_name.values())


@pytest.mark.parametrize(
    "faults",
    [
        ["break off"],
        [500, 503, 429],
        ["break off", 500, "break off", "break off", 502],
        [None, "break off", None, 500, None, "break off"],
    ],
)
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_reading_goes_on_where_it_broke_off(server, tar, faults, ranges):
    server.files["/a.tar"], server.ranges = tar, ranges
    found = find_units([f"{server.url}/a.tar"])
    server.faults = list(faults)
    assert [row.key for row in found[0].rows()] == KEYS
    assert server.faults == [] or not ranges


@pytest.mark.parametrize("fault", ["break off", 500])
def test_a_server_that_does_not_recover(server, tar, fault):
    server.files["/a.tar"] = tar
    (unit,) = find_units([f"{server.url}/a.tar"])
    server.faults = [None, *[fault] * 1000]
    with pytest.raises(SourceError) as caught:
        list(unit.rows())
    line = str(caught.value)
    assert f"{server.url}/a.tar" in line
    assert f"{retry.TRIES} times" in line
    assert "\n" not in line
    assert ("HTTP 500" in line) == (fault == 500)


def test_answers_that_will_not_change_are_not_asked_for_again(server, tar, tmp_path):
    words = ["--model", "tiny-sd", "--cache", tmp_path / "c"]
    line = refusal("encode", "--shards", f"{server.url}/a.tar", *words)
    assert f"{server.url}/a.tar cannot be read (HTTP 404)" in line
    assert server.requests.total() <= 2
    server.files["/a.tar"] = tar
    (unit,) = find_units([f"{server.url}/a.tar"])
    server.faults = [403]
    with pytest.raises(SourceError, match="HTTP 403"):
        list(unit.rows())


def test_a_server_that_is_not_there(server):
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=rf"{url}/a\.tar cannot be read"):
        find_units([f"{url}/a.tar"])


def test_passwords_stay_out_of_the_cache(server, tar):
    server.files["/a.tar"] = tar
    (unit,) = find_units([server.url.replace("://", "://user:secret@") + "/a.tar"])
    assert unit.source == f"{server.url}/a.tar"
    assert next(unit.rows()).key == KEYS[0]
