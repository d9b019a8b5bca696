"""--holdout N: the same samples stay set aside, and nothing is ever trained on them."""

import json
import shutil

import numpy as np
import pytest

from prep.cache import holdout
from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.errors import UserError
from tests.support.sources import (
    accounts,
    captioned,
    encode,
    prep,
    refusal,
    samples,
    tree,
    write_folder,
    write_tar,
)  # fmt: skip
from train.data.bucket import first_samples, open_buckets


def keys_of(cache, heldout: bool) -> list[str]:
    """Keys that the trainer, or the evaluation, gets to see, as they lie in the shards."""
    found = []
    manifest = open_manifest(cache)
    for bucket in open_buckets(cache, manifest, heldout=heldout):
        for number in range(len(bucket)):
            shard, start = bucket.locate(number)
            with bucket.paths[shard].open("rb") as file:
                file.seek(start)
                found.append(file.read(16).decode())
        bucket.close()
    return found


@pytest.fixture
def tars(tmp_path):
    return [
        write_tar(tmp_path / "a.tar", captioned(range(8))),
        write_tar(tmp_path / "b.tar", captioned(range(8, 20))),
    ]


def test_the_trainer_sees_all_but_the_held_out(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache", holdout=5)
    everything = sorted(row["key"] for row in accounts(cache))
    assert len(everything) == 20
    aside, rest = keys_of(cache, heldout=True), keys_of(cache, heldout=False)
    assert sorted(aside) == everything[:5]  # the smallest hashes
    assert sorted(rest) == everything[5:]
    assert prep("verify", "--cache", cache).status == 0


def test_samples_that_are_read_are_those_that_are_meant(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache", holdout=5)
    keys = {row["source_key"]: row["key"] for row in accounts(cache)}
    latents = {keys[name]: sample.arrays["latents"] for name, sample in samples(cache).items()}
    for heldout in (True, False):
        (bucket,) = open_buckets(cache, open_manifest(cache), heldout=heldout)
        for number, key in enumerate(keys_of(cache, heldout)):
            row = np.empty(latents[key].shape[1:], np.float16)
            bucket.read(number, "latents", 0, row)
            assert (row == latents[key][0]).all()


def test_the_first_so_many_are_of_those_trained_on(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache", holdout=5)
    manifest = open_manifest(cache)
    rest = keys_of(cache, heldout=False)
    for count in (1, 6, 8, 15, 100):
        taken = first_samples(manifest.shards, count)
        assert sum(shard.trained for shard in taken) == min(count, 15)
        (bucket,) = open_buckets(cache, manifest, max_samples=count)
        assert len(bucket) == min(count, 15)
        assert bucket.locate(len(bucket) - 1)[1] >= 0
    assert len(rest) == 15


def test_without_the_flag_a_cache_is_as_it_always_was(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache")
    assert not (cache / "holdout.json").exists()
    stored = json.loads((cache / "manifest.json").read_text())
    assert "holdout" not in stored
    assert all("heldout" not in row for row in stored["shards"])
    with_some = encode(tars, tmp_path / "with", holdout=3)
    same = {name: content for name, content in tree(with_some).items() if "holdout" not in name}
    before = tree(cache)
    assert same.keys() == before.keys()
    assert {n for n in before if before[n] != same[n]} == {"manifest.json"}


@pytest.mark.parametrize("source", ["tars", "folder"])
def test_what_is_held_out_stays_so_when_pictures_come_and_go(tmp_path, source):
    cache = tmp_path / "cache"

    def encode_first(count: int, **flags) -> None:
        if source == "folder":
            shards = write_folder(tmp_path / "pictures", range(count))
        else:
            shards = [
                write_tar(tmp_path / f"{n}.tar", captioned(range(n, n + 6)))
                for n in range(0, count, 6)
            ]
        encode(shards, cache, **flags)

    encode_first(12, holdout=4)
    aside = set(keys_of(cache, heldout=True))
    trained = set(keys_of(cache, heldout=False))
    encode_first(36, holdout=4)  # the same flag
    assert set(keys_of(cache, heldout=True)) == aside
    assert trained < set(keys_of(cache, heldout=False))
    encode_first(42)  # and without it
    assert set(keys_of(cache, heldout=True)) == aside
    assert len(keys_of(cache, heldout=False)) == 38
    encode_first(6, prune=True)  # nothing that was trained on takes the place of what is gone
    assert set(keys_of(cache, heldout=True)) <= aside
    assert set(keys_of(cache, heldout=False)).isdisjoint(aside)
    assert prep("verify", "--cache", cache).status == 0


def test_another_number_chooses_anew_and_0_ends_it(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache")
    answer = prep("finish", "--cache", cache, "--no-report", "--holdout", 7)
    assert "7 samples held out" in answer.out
    assert len(keys_of(cache, heldout=True)) == 7
    prep("finish", "--cache", cache, "--no-report", "--holdout", 2)
    assert len(keys_of(cache, heldout=True)) == 2
    prep("finish", "--cache", cache, "--no-report", "--holdout", 0)
    assert open_manifest(cache).heldout == 0
    assert len(keys_of(cache, heldout=False)) == 20


def test_some_must_be_left_to_train_on(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache")
    line = refusal("finish", "--cache", cache, "--holdout", 20)
    assert "--holdout 20: the cache has 20 samples" in line
    answer = prep("finish", "--cache", cache, "--no-report", "--holdout", 19)
    assert "19 samples held out" in answer.out
    assert len(keys_of(cache, heldout=False)) == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_come_to_the_same(tmp_path, order):
    tars = [write_tar(tmp_path / f"{n}.tar", captioned(range(n, n + 4))) for n in (0, 4, 8)]
    whole = encode(tars, tmp_path / "whole", holdout=5)
    cache = tmp_path / "parts"
    for part in order:
        encode(tars, cache, holdout=5, part=f"{part}/3")
    assert prep("finish", "--cache", cache, "--no-report").status == 0
    assert tree(cache) == tree(whole)


def test_an_archive_carries_what_is_held_out(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache", holdout=5)
    assert prep("pack", "--cache", cache, "--output", tmp_path / "archive").status == 0
    answer = prep("unpack", "--input", tmp_path / "archive", "--cache", tmp_path / "back")
    assert answer.status == 0, answer.err
    assert tree(tmp_path / "back") == tree(cache)
    assert prep("finish", "--cache", tmp_path / "back", "--no-report").status == 0
    assert keys_of(tmp_path / "back", heldout=True) == keys_of(cache, heldout=True)


def test_a_manifest_that_forgot_is_damage(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache", holdout=5)
    stored = json.loads((cache / "manifest.json").read_text())
    for row in stored["shards"]:
        row.pop("heldout", None)
    (cache / "manifest.json").write_text(json.dumps(stored))
    answer = prep("verify", "--cache", cache)
    assert answer.status == 1
    assert "manifest.json" in answer.err
    assert prep("finish", "--cache", cache, "--no-report").status == 0
    assert len(keys_of(cache, heldout=True)) == 5


def test_overwritten_settings_keep_them(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache", holdout=5)
    aside = keys_of(cache, heldout=True)
    encode(tars, cache, overwrite=True, resolution=48)
    assert keys_of(cache, heldout=True) == aside


def test_a_shard_that_is_gone_is_told(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache")
    manifest = open_manifest(cache)
    shutil.rmtree(cache / "shards")
    with pytest.raises(UserError, match="is missing"):
        holdout.keys_up_to(CachePaths(cache), manifest.shards, "f" * 16)
