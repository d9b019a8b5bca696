"""Who reads a cache while stage one changes it sees the former whole cache or the new one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.cache.manifest import open_manifest
from shared.errors import UserError
from tests.support.reader import read_bucket, read_cache
from tests.support.sources import captioned, encode, prep, shards, write_tar
from train.data.bucket import open_buckets

READER = Path(__file__).parents[1] / "support" / "reader.py"
DAY = 24 * 3600


@pytest.fixture
def tars(tmp_path):
    return [write_tar(tmp_path / f"{n}.tar", captioned(range(8 * n, 8 * n + 4))) for n in range(2)]


def age(folder: Path, seconds: float) -> None:
    """Date back everything in it."""
    for path in folder.rglob("*"):
        os.utime(path, (path.stat().st_mtime - seconds,) * 2)


def edited(tars, cache):
    """Another caption and another picture in the first tar, encoded; the former shards."""
    former = shards(cache)
    write_tar(tars[0], [*captioned(range(3)), ("0009.png", captioned([9])[0][1]),
                        ("0009.txt", b"nine")])  # fmt: skip
    encode(tars, cache)
    return [path for path in former if path not in shards(cache)]


def test_a_trainer_keeps_the_cache_it_opened_for_a_day(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache")
    buckets = open_buckets(cache, open_manifest(cache))  # opens each shard when it first reads it
    age(cache, 30 * DAY)
    (gone,) = edited(tars, cache)
    assert "1 in use less than a day ago kept" in prep("gc", "--cache", cache).out
    for bucket in buckets:
        read_bucket(bucket)
    age(cache, 1.1 * DAY)
    assert prep("gc", "--cache", cache).status == 0
    assert not gone.exists()
    read_cache(cache)


def test_a_shard_that_is_gone_is_told_in_one_line(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache")
    (bucket,) = open_buckets(cache, open_manifest(cache))
    (gone,) = edited(tars, cache)
    assert prep("gc", "--cache", cache, "--all").status == 0
    with pytest.raises(UserError) as caught:
        read_bucket(bucket)
    assert str(gone) in str(caught.value)
    assert "removed after the cache was opened; run the same command again" in str(caught.value)


def test_repair_leaves_a_trainer_what_it_opened(tars, tmp_path):
    """Its manifest goes, and with it what `gc` would have known it by."""
    cache = encode(tars, tmp_path / "cache")
    buckets = open_buckets(cache, open_manifest(cache))
    age(cache, 30 * DAY)
    next((cache / "samples").glob("0-*")).write_bytes(b"damaged")
    prep("verify", "--cache", cache, "--repair")
    prep("gc", "--cache", cache)
    for bucket in buckets:
        read_bucket(bucket)


def test_a_damaged_manifest_is_folded_anew(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache")
    wanted = (cache / "manifest.json").read_bytes()
    (cache / "manifest.json").write_bytes(wanted[:100])
    assert prep("finish", "--cache", cache, "--no-report").status == 0
    assert (cache / "manifest.json").read_bytes() == wanted


@pytest.mark.slow
def test_a_reader_beside_an_encode_that_replaces_units_over_and_over(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache")
    versions = [tars, tmp_path / "other"]
    versions[1].mkdir()
    for n in range(2):  # other pictures under the same names
        write_tar(versions[1] / f"{n}.tar", captioned(range(8 * n + 1, 8 * n + 5)))
    contents = [[p.read_bytes() for p in tars], [(versions[1] / p.name).read_bytes() for p in tars]]
    allowed = {read_cache(cache)}
    stop = tmp_path / "stop"
    reader = subprocess.Popen(
        [sys.executable, READER, cache, stop],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    rounds, end = 0, time.monotonic() + 40
    while rounds < 6 or time.monotonic() < end:
        rounds += 1
        for path, content in zip(tars, contents[rounds % 2], strict=True):
            path.write_bytes(content)
            os.utime(path, ns=(rounds, rounds))
        age(cache, 30 * DAY)
        encode(tars, cache)
        allowed.add(read_cache(cache))
        prep("gc", "--cache", cache)
    stop.touch()
    answer = json.loads(reader.communicate(timeout=120)[0])
    assert answer["problems"] == []
    assert set(answer["views"]) == allowed
    assert len(allowed) == 2
    assert sum(answer["views"].values()) > 2
