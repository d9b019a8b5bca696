"""What is stale leaves a cache whole: by --overwrite, by --prune, and when a source is cut anew."""

import json
import os
import shutil
import time

import pytest

from prep.encode.writer import UnitWriter
from shared.cache.conditioning import load_conditioning
from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.errors import UserError
from tests.support.sources import (
    accounts,
    captioned,
    encode,
    manifest,
    prep,
    refusal,
    shards,
    tree,
    units,
    write_folder,
    write_tar,
)


@pytest.fixture
def tars(tmp_path):
    return [
        write_tar(tmp_path / f"{name}.tar", captioned(range(first, first + 2)))
        for name, first in (("a", 0), ("b", 10), ("c", 20))
    ]


def finish(cache):
    answer = prep("finish", "--cache", cache, "--no-report")
    assert answer.status == 0, answer.err


# --- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_parts_of_a_folder_that_is_cut_anew_end_as_one_process_does(tmp_path, order):
    """One part after the other, so that the second one finds what the first one has done."""
    folder = write_folder(tmp_path / "pictures", range(10))
    cache = encode(folder, tmp_path / "cache", folder_units=2)
    wanted = shutil.copytree(cache, tmp_path / "wanted")
    write_folder(folder, range(2, 10))
    encode(folder, wanted, folder_units=4)
    words = ["--shards", folder, "--model", "tiny-sd", "--threads", 1, "--folder-units", 4]
    for number in order:
        if number == order[1]:  # finished too early, it would hold pictures twice
            line = refusal("finish", "--cache", cache)
            assert f"{folder} is being cut into another number of units" in line
            assert "with --part every part of it, to its end" in line
        answer = prep("encode", *words, "--cache", cache, "--part", f"{number}/2")
        assert answer.status == 0, answer.err
        assert "0 pictures and 0 captions encoded, " in answer.out
    finish(cache)
    assert tree(cache) == tree(wanted)
    keys = [row["source_key"] for row in accounts(cache)]
    assert sorted(keys) == [f"{n:04d}.png" for n in range(2, 10)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_parts_prune_what_one_process_would(tars, tmp_path, order):
    cache = encode(tars, tmp_path / "cache")
    for number in order:
        encode(tars[:1], cache, prune=True, part=f"{number}/2")
    finish(cache)
    assert [unit["source"] for unit in units(cache).values()] == [str(tars[0])]
    assert manifest(cache)["totals"]["written"] == 2


# --- other settings -----------------------------------------------------------------------------

WORDS = ("--threads", 1, "--latents", "mean", "--no-report")


def without_generation(folder):
    """The cache's records, identity and manifest as they would be in a new one."""
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("**/*.json")}
    for value in found.values():
        value.pop("generation", None)
        value.get("identity", {}).pop("generation", None)
    return found


def test_overwrite_replaces_a_cache_of_other_settings(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache")
    former = shards(cache)
    for path in former:
        os.utime(path, (time.time() - 10 * 24 * 3600,) * 2)
    assert prep("embed", "--cache", cache, "--prompts", "a red kite").status == 0
    words = ["--model", "tiny-sd", "--cache", cache, *WORDS]
    line = refusal("encode", "--shards", *tars, *words, "--resolution", 48)
    assert "resolution is 64 there, 48 here" in line
    assert line.endswith("or replace what is there with --overwrite")
    words = ["encode", "--shards", *tars[:2], *words]
    answer = prep(*words, "--resolution", 48, "--overwrite")
    assert answer.status == 0, answer.err
    assert "4 pictures and 4 captions encoded" in answer.out
    fresh = encode(tars[:2], tmp_path / "fresh", resolution=48)
    assert without_generation(cache) == without_generation(fresh)
    assert [path.name for path in shards(cache)] == [path.name for path in shards(fresh)]
    prompts = load_conditioning(cache / "conditioning.safetensors").prompts
    assert "a red kite" in prompts  # the text encoders are the same
    # A trainer that read the former manifest goes on; nobody's grace is cut short.
    assert prep("gc", "--cache", cache).status == 0
    assert all(path.exists() for path in former)
    assert prep("verify", "--cache", cache).status == 0
    # Once more, it has nothing to do; and without the flag it goes on.
    before = tree(cache)
    assert "nothing had to be encoded" in prep(*words, "--resolution", 48, "--overwrite").out
    assert "nothing had to be encoded" in prep(*words, "--resolution", 48).out
    assert tree(cache) == before


def test_a_killed_overwrite_says_so_and_the_same_command_ends_it(tars, tmp_path, monkeypatch):
    cache = encode(tars, tmp_path / "cache")
    commit = UnitWriter.commit

    def killed_at_the_second(self, *args):
        if any("generation" in unit for unit in units(cache).values()):
            raise KeyboardInterrupt
        return commit(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(UnitWriter, "commit", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            encode(tars, cache, seed=3, random_crop=True, overwrite=True)
    with pytest.raises(UserError, match="unfinished: run the same `prep encode` to its end"):
        open_manifest(cache)
    line = refusal("finish", "--cache", cache)
    assert "2 units still to be encoded with the settings that --overwrite brought" in line
    encode(tars, cache, seed=3, random_crop=True, overwrite=True)
    fresh = encode(tars, tmp_path / "fresh", seed=3, random_crop=True)
    assert without_generation(cache) == without_generation(fresh)


def test_parts_overwrite_together(tars, tmp_path):
    """Also the units that no part lists any more; another model brings its own prompts."""
    cache = encode(tars, tmp_path / "cache")
    for part in ("1/2", "0/2"):
        encode(tars[:2], cache, model="tiny-xl", overwrite=True, part=part)
        if part == "1/2":
            assert "1 unit still to be encoded" in refusal("finish", "--cache", cache)
    finish(cache)
    fresh = encode(tars[:2], tmp_path / "fresh", model="tiny-xl")
    assert without_generation(cache) == without_generation(fresh)
    stored = load_conditioning(CachePaths(cache).conditioning)
    assert stored.unconditional.pooled_prompt_embeds is not None


def test_another_vae_is_calibrated_anew(tars, tmp_path):
    """Its scale is not that of the cache's former VAE."""
    cache = encode(tars[0], tmp_path / "cache", vae_dtype="float16")
    identity = json.loads((cache / "identity.json").read_text())
    identity["vae"] |= {"fingerprint": "another", "rescale": 2.0**-20}
    (cache / "identity.json").write_text(json.dumps(identity))
    encode(tars[0], cache, vae_dtype="float16", overwrite=True)
    fresh = encode(tars[0], tmp_path / "fresh", vae_dtype="float16")
    assert without_generation(cache) == without_generation(fresh)


def test_a_strangers_identity_is_left_alone(tars, tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "identity.json").write_text('{"name": "somebody"}')
    before = tree(tmp_path / "web")
    words = ["--shards", tars[0], "--model", "tiny-sd", "--cache", tmp_path / "web", *WORDS]
    line = refusal("encode", *words, "--overwrite")
    assert "identity.json is not one that `prep encode` writes; choose another --cache" in line
    assert tree(tmp_path / "web") == before
