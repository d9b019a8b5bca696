"""What tests of both commands that write answers ask of a cache."""

import os
import time

from shared.cache.answers_store import open_answers
from tests.support.sources import prep


def shard_of(cache):
    """The only shard of a cache's answers."""
    [shard] = open_answers(cache).shards
    return cache / "answers" / shard.file


def assert_gc_removes(cache, former):
    """Shard `former` goes when nobody can read it any more, and what the manifest names stays."""
    assert former != shard_of(cache)
    assert prep("gc", "--cache", cache).status == 0  # a training may still read the former ones
    assert former.exists()
    for path in (cache / "answers" / "shards").iterdir():
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    assert prep("gc", "--cache", cache).status == 0
    assert not former.exists()
    assert shard_of(cache).exists()
    assert prep("verify", "--cache", cache).status == 0
