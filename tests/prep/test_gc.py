"""`prep gc` removes what nobody names, and nothing else."""

import os
import shutil
import time

import pytest

from tests.support.sources import (
    captioned,
    encode,
    png,
    prep,
    refusal,
    shards,
    tree,
    write_tar,
)
from tests.support.temporary import holding, left_by_the_dead


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tidy")
    bad = [("bad\x1b[2J.png", b"no picture"), ("bad\x1b[2J.txt", b"x"), ("bare.png", png(1))]
    return [
        write_tar(folder / "a.tar", [*captioned(range(5)), *bad]),
        write_tar(folder / "b.tar", captioned(range(10, 14))),
    ]


@pytest.fixture(scope="module")
def clean(tars):
    return encode(tars, tars[0].parent / "cache")


@pytest.fixture
def cache(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "cache")


def litter(cache, age):
    """A shard, a table and a stray of nobody; returns them."""
    found = [
        cache / "shards" / "gone-8x8-0123456789ab.tar",
        cache / "samples" / "gone-0123456789ab.parquet",
    ]
    for path in found:
        path.write_bytes(bytes(1000))
        os.utime(path, (time.time() - age,) * 2)
    return found


def test_gc_removes_what_no_record_names_and_says_how_much(cache):
    wanted = tree(cache)
    litter(cache, 25 * 3600)
    left_by_the_dead(cache / "tmp", size=500)
    with holding(cache / "tmp", size=500):
        littered = tree(cache)
        answer = prep("gc", "--cache", cache, "--dry-run")
        assert "2 files and 1 stray in tmp/ would be removed, 2,500 bytes" in answer.out
        assert "gone-8x8-0123456789ab.tar" in answer.out
        assert tree(cache) == littered
        assert "2,500 bytes (2.5 kB) freed" in prep("gc", "--cache", cache).out
        assert len(tree(cache).keys() - wanted.keys()) == 2  # the living one's lock and file
    assert "0 files and 1 stray" in prep("gc", "--cache", cache).out
    assert tree(cache) == wanted
    assert "0 files and 0 strays" in prep("gc", "--cache", cache).out


def test_gc_all_removes_what_may_be_another_hosts_unless_it_is_in_use(cache):
    """Named as an earlier version did, it may be alive; whoever says --all knows."""
    (cache / "tmp").mkdir(exist_ok=True)
    (cache / "tmp" / "elsewhere-1-0123456789ab-spool").write_bytes(bytes(500))
    with holding(cache / "tmp") as living:
        assert "0 files and 0 strays" in prep("gc", "--cache", cache).out
        assert "0 files and 1 stray" in prep("gc", "--cache", cache, "--all").out
        assert living.exists()


def test_gc_keeps_what_a_running_encode_may_be_about_to_name(cache):
    young = litter(cache, 60)
    assert "2 in use less than a day ago kept" in prep("gc", "--cache", cache).out
    assert all(path.exists() for path in young)
    assert prep("gc", "--cache", cache, "--all").status == 0
    assert not any(path.exists() for path in young)


def test_gc_never_touches_what_is_not_ours(cache):
    mine = [cache / "shards" / "holiday.tar", cache / "samples" / "notes.txt", cache / "x.tar"]
    link = cache / "shards" / "link-8x8-0123456789ab.tar"
    for path in mine:
        path.write_bytes(b"mine")
        os.utime(path, (0, 0))
    link.symlink_to(mine[0])
    assert prep("gc", "--cache", cache, "--all").status == 0
    assert all(path.exists() for path in (*mine, link))


def test_gc_keeps_what_the_manifest_names(cache):
    """Somebody may be training on it, although its record is gone."""
    for path in (cache / "units").iterdir():
        path.unlink()
    assert prep("gc", "--cache", cache, "--all").status == 0
    assert all(path.exists() for path in shards(cache))


def test_gc_removes_nothing_where_a_record_cannot_be_read(cache, tmp_path):
    next((cache / "units").iterdir()).write_text("{")
    before = tree(cache, *(path.name for path in litter(cache, 25 * 3600)))
    assert "not valid JSON" in refusal("gc", "--cache", cache)
    assert all((cache / name).exists() for name in before)
    assert (cache / "shards" / "gone-8x8-0123456789ab.tar").exists()
    assert "nothing was removed" in refusal("gc", "--cache", tmp_path)
