"""Shards that are not what the manifest says are refused before the first step, at little cost."""

import json
import os
import shutil

import numpy as np
import pytest
from upath import UPath

from shared.cache.manifest import open_manifest
from shared.errors import UserError
from tests.support.sources import (
    captioned,
    encode,
    manifest,
    prep,
    refusal,
    shards,
    write_folder,
    write_tar,
)
from train.data.bucket import open_buckets
from train.data.local import LocalReader
from train.data.shard_check import check_heads
from train.data.soundness import fault


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Two shards of the same size."""
    folder = tmp_path_factory.mktemp("heads")
    tars = [write_tar(folder / f"{n}.tar", captioned(range(4 * n, 4 * n + 4))) for n in range(2)]
    return encode(tars, folder / "cache")


@pytest.fixture
def cache(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "cache")


def look(cache):
    check_heads(open_buckets(cache, open_manifest(cache)))


def forget(cache):
    """As a version wrote it that did not record first keys."""
    for path in (cache / "manifest.json", *(cache / "units").iterdir()):
        stored = json.loads(path.read_text())
        for shard in stored["shards"]:
            del shard["first_key"]
        path.write_text(json.dumps(stored))


def test_whole_shards_pass_and_older_caches_too(cache):
    look(cache)
    forget(cache)
    look(cache)


def test_zeros(cache):
    path = shards(cache)[1]
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=rf"{path.name} is damaged: .*first sample.*prep verify"):
        look(cache)


def test_swapped_shards(cache):
    first, second = shards(cache)
    assert first.stat().st_size == second.stat().st_size
    first.rename(cache / "x")
    second.rename(first)
    (cache / "x").rename(second)
    with pytest.raises(UserError, match="it holds another shard's samples; `prep verify`"):
        look(cache)


def test_a_copy_of_another_shard_in_an_older_cache(cache):
    first, second = shards(cache)
    shutil.copy(first, second)
    forget(cache)
    with pytest.raises(UserError, match=r"begins with the same sample .* one is a copy"):
        look(cache)


def test_a_unit_of_a_folder_that_was_swapped(tmp_path):
    """Their names differ by number alone."""
    source = write_folder(tmp_path / "pictures", range(12))
    cache = encode(source, tmp_path / "cache", folder_units=2)
    rows = manifest(cache)["shards"]
    assert all(row["first_key"] for row in rows)
    keys = [row["first_key"] for row in rows]
    rows[0]["first_key"], rows[1]["first_key"] = keys[1], keys[0]
    stored = manifest(cache) | {"shards": rows}
    (cache / "manifest.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="holds another shard's samples"):
        look(cache)


def test_a_page_of_each_shard_is_read_and_no_more(cache, monkeypatch):
    asked = []
    finish = LocalReader.finish

    def note(self, spans):
        asked.extend(spans)
        finish(self, spans)

    monkeypatch.setattr(LocalReader, "start", lambda self, spans: list(spans))
    monkeypatch.setattr(LocalReader, "finish", note)
    look(cache)
    assert len(asked) == 2
    assert all(span.nbytes <= 4096 and span.offset == 0 for span in asked)


def test_a_remote_cache_is_looked_at_through_ranged_reads(cache):
    remote = UPath("memory://heads")
    for path in sorted(cache.rglob("*")):
        if path.is_file():
            (remote / path.relative_to(cache)).write_bytes(path.read_bytes())
    root = UPath("memory://heads/shards")
    name = shards(cache)[0].name
    buckets = open_buckets(remote, open_manifest(cache))
    check_heads(buckets)
    (root / name).write_bytes(bytes(shards(cache)[0].stat().st_size))
    with pytest.raises(UserError, match="is damaged: where its first sample"):
        check_heads(buckets)


def rewrite(cache, name, change):
    """Sample 1 of the first shard with other values in a field, its checksum right."""
    path = shards(cache)[0]
    [layout] = open_manifest(cache).layouts
    content = bytearray(path.read_bytes())
    place = slice(layout.stride, 2 * layout.stride)
    key, record, arrays = layout.unpack(bytes(content[place]))
    arrays[name] = change(arrays[name])
    record.pop("crc32")
    content[place] = layout.pack(key, record | {"crc32": layout.crc32(arrays)}, arrays)
    path.write_bytes(content)
    return key


@pytest.mark.parametrize("name", ["latents", "prompt_embeds"])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_verify_names_a_sample_of_one_value_alone(cache, name, value):
    key = rewrite(cache, name, lambda array: np.full_like(array, value))
    path = shards(cache)[0]
    lines = prep("verify", "--cache", cache).err
    assert f"{path.relative_to(cache)} sample 1 ({key}): {name} of one value alone" in lines


def test_one_value_alone_is_a_fault_and_a_clamped_logvar_is_none():
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(4, 8, 8)).astype(np.float16)
    text = rng.normal(size=(7, 5)).astype(np.float16)
    posterior = np.concatenate([mean, np.full_like(mean, -30)])
    assert fault([mean, text], 4) == fault([posterior, text], 4) == ""
    assert fault([np.zeros_like(posterior), text], 4) == "one value alone"
    assert fault([np.concatenate([np.ones_like(mean), mean]), text], 4) == "one value alone"
    assert fault([mean, np.zeros_like(text)], 4) == "one value alone"
    same_ends = mean.copy()
    same_ends[-1, -1, -1] = same_ends[0, 0, 0]
    assert fault([same_ends], 4) == ""


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_neither_hangs_nor_crashes(cache, kind):
    path = shards(cache)[0]
    path.unlink()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    answer = prep("verify", "--cache", cache)
    assert answer.status == 1
    assert f"damaged: shards/{path.name} is a folder or a pipe, no file" in answer.err
    assert "is missing" in refusal("decode", "--cache", cache)
