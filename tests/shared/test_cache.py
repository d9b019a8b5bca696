"""Identity, unit records and manifest: what they refuse, what they add up to, what they name."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from shared.cache.conditioning import Conditioning, TextEmbeds, load_conditioning, save_conditioning
from shared.cache.identity import Identity, claim_identity, differences, other_settings
from shared.cache.layout import cache_layout
from shared.cache.manifest import (
    commit_unit,
    fold,
    open_manifest,
    read_unit,
    read_units,
    write_manifest,
)
from shared.cache.paths import CachePaths
from shared.cache.sums import ChannelSums
from shared.cache.units import Shard, UnitRecord
from shared.errors import UserError
from shared.models.fingerprint import fingerprint
from tests.support.identity import an_identity

SMALL = cache_layout((1, 4, 8, 8), (1, 16, 64))
WIDE = cache_layout((1, 4, 8, 16), (1, 16, 64))


@pytest.fixture
def cache(tmp_path):
    return CachePaths(tmp_path / "cache")


def make_shard(cache: CachePaths, file: str, layout=SMALL, count: int = 3) -> Shard:
    path = cache.root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(layout.shard_bytes(count)))
    return Shard(file, layout, count, layout.shard_bytes(count), "0" * 64)


def make_unit(name: str, shards=(), rejected=None, sums=None, truncated=0) -> UnitRecord:
    written = sum(shard.count for shard in shards)
    rejected = rejected or {}
    read = written + sum(rejected.values())
    return UnitRecord(
        name, f"{name}.tar", {"size": 5}, tuple(shards), f"samples/{name}.parquet", "1" * 64,
        read, written, rejected, truncated, sums,
    )  # fmt: skip


# ---- Identity.


def test_differences_name_both_sides():
    stored = {"a": 1, "latents": {"size": 64, "kind": "mean"}, "gone": True, "same": [1, 2]}
    wanted = {"a": 1, "latents": {"size": 32, "kind": "mean"}, "new": "x", "same": [1, 2]}
    assert differences(stored, wanted) == (
        "gone is True there, None here; latents.size is 64 there, 32 here; "
        "new is None there, x here"
    )
    assert differences(stored, stored) == ""
    assert differences({"a": {"b": 1}}, {"a": 2}) == "a is {'b': 1} there, 2 here"
    long = differences({"hash": "0123456789abcdef" * 4}, {"hash": "short"})
    assert long == "hash is 0123456789abcdef... there, short here"


def test_the_first_to_claim_sets_the_identity(cache):
    identity = an_identity(fingerprint="f", resolution=512)
    claim_identity(cache, identity, "do this")
    claim_identity(cache, identity, "do this")  # the same again is fine
    before = cache.identity.read_bytes()
    claim_identity(cache, replace(identity, model="./a/copy"), "do this")  # so is another name
    other = an_identity(fingerprint="f", resolution=768)
    with pytest.raises(UserError) as error:
        claim_identity(cache, other, "choose another --cache")
    assert str(error.value) == (
        f"{cache.root} was made with other settings: preprocessing.resolution is 512 "
        "there, 768 here; choose another --cache"
    )
    with pytest.raises(UserError, match=r"vae\.fingerprint is f there, g here"):
        claim_identity(cache, an_identity(fingerprint="g", resolution=512), "")
    assert cache.identity.read_bytes() == before


def test_an_identity_is_written_back_as_it_was_read():
    """With what this version does not know, and without what older ones did not say."""
    stored = json.loads(json.dumps(an_identity().to_json()))
    stored["vae"] |= {"shift": 0.5}
    del stored["preprocessing"]["where"]
    identity = Identity.from_json(stored | {"later": {"a": 1}})
    assert identity.to_json() == stored | {"later": {"a": 1}}
    assert identity.preprocessing.where is None
    assert other_settings(identity, an_identity()) == (
        "later is {'a': 1} there, None here; vae.shift is 0.5 there, None here"
    )


# ---- Units.


def test_a_unit_counts_once_it_is_committed(cache):
    assert read_unit(cache, "a") is None
    assert read_units(cache) == []
    sums = ChannelSums(5, (1.0, 2.0), (3.0, 4.0))
    second = make_unit("b", [make_shard(cache, "shards/b.tar")], {"not an image": 2}, sums)
    first = make_unit("a")
    for record in (second, first):
        commit_unit(cache, record)
    assert read_units(cache) == [first, second]
    assert read_unit(cache, "b") == second
    changed = make_unit("b", rejected={"empty": 1})
    commit_unit(cache, changed)
    assert read_units(cache) == [first, changed]


def test_a_record_must_add_up():
    with pytest.raises(AssertionError):
        UnitRecord("a", "", {}, (), "", "", read=3, written=1, rejected={"x": 1})


def test_records_survive_json():
    record = make_unit("a", [], {"x": 1}, ChannelSums(1, (0.1,), (0.2,)), truncated=4)
    assert UnitRecord.from_json(json.loads(json.dumps(asdict(record)))) == record


def test_sums_add_up_to_mean_and_std():
    rng = np.random.default_rng(0)
    latents = rng.normal([[[[3.0]], [[-2.0]]]], [[[[0.5]], [[4.0]]]], (50, 2, 6, 7))
    latents = latents.astype(np.float16)
    sums = ChannelSums.of(latents[:20]) + ChannelSums.of(latents[20:])
    mean, std = sums.mean_std()
    np.testing.assert_allclose(mean, latents.astype(float).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, latents.astype(float).std((0, 2, 3)), rtol=1e-9)
    views = ChannelSums.of(latents[None])  # any leading axes
    np.testing.assert_allclose(views.mean_std()[0], mean)
    constant = ChannelSums.of(np.full((3, 1, 2, 2), 0.1, np.float16))
    assert constant.mean_std()[1] == pytest.approx([0], abs=1e-6)  # no root of minus nothing


# ---- Manifest.


def test_a_manifest_is_what_its_units_add_up_to(cache):
    units = [
        make_unit("a", [make_shard(cache, "shards/a-wide.tar", WIDE, 2),
                        make_shard(cache, "shards/a.tar", SMALL, 5)],
                  {"empty": 1}, ChannelSums(10, (10.0,), (30.0,)), truncated=1),
        make_unit("b", [], {"empty": 2, "corrupt": 4}),
        make_unit("c", [make_shard(cache, "shards/c.tar", SMALL, 1)],
                  sums=ChannelSums(10, (30.0,), (110.0,)), truncated=2),
    ]  # fmt: skip
    manifest = fold(an_identity(), units, {"torch": "2"})
    assert [shard.file for shard in manifest.shards] == [
        "shards/a-wide.tar", "shards/a.tar", "shards/c.tar",
    ]  # fmt: skip
    assert [shard.layout for shard in manifest.shards] == [WIDE, SMALL, SMALL]
    assert len(manifest.layouts) == 2
    assert asdict(manifest.totals) == {
        "units": 3, "read": 15, "written": 8, "rejected": {"corrupt": 4, "empty": 3},
        "truncated_captions": 3, "bytes": WIDE.shard_bytes(2) + SMALL.shard_bytes(5)
        + SMALL.shard_bytes(1),
    }  # fmt: skip
    assert manifest.statistics["latents_mean"] == [2.0]
    assert manifest.statistics["latents_std"] == pytest.approx([3**0.5])
    write_manifest(cache, manifest)
    again = open_manifest(cache.root)
    assert again == manifest
    assert fold(an_identity(), [], {}).statistics == {"latents_mean": [], "latents_std": []}


def test_the_real_manifest_opens_and_adds_up(tiny_cache, tiny_xl_cache):
    for root, count, fields in ((tiny_cache, 72, 2), (tiny_xl_cache, 24, 4)):
        manifest = open_manifest(root)
        assert sum(shard.count for shard in manifest.shards) == count == manifest.totals.written
        assert len(manifest.layouts[0].fields) == fields
        assert manifest.totals.bytes == sum(p.stat().st_size for p in (root / "shards").iterdir())
        assert fold(manifest.identity, read_units(CachePaths(root)), manifest.versions) == manifest
        assert all(std > 0 for std in manifest.statistics["latents_std"])


@pytest.fixture
def written(cache):
    shards = [make_shard(cache, f"shards/{name}.tar") for name in "ab"]
    write_manifest(cache, fold(an_identity(), [make_unit("u", shards)], {}))
    return cache


def test_a_missing_cache_an_unfinished_one_and_another_format(cache, written, tmp_path):
    with pytest.raises(UserError, match=r"is not a cache .*prep encode --cache"):
        open_manifest(tmp_path / "mistyped")
    stored = json.loads(written.manifest.read_text())
    written.manifest.write_text(json.dumps({**stored, "format": 2}))
    with pytest.raises(UserError, match="has cache format 2, this version reads 1"):
        open_manifest(written.root)
    written.manifest.write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is not valid JSON"):
        open_manifest(written.root)
    written.manifest.unlink()
    written.identity.write_text("{}")
    with pytest.raises(UserError, match="is unfinished: run the same `prep encode`"):
        open_manifest(written.root)


def test_shards_are_checked_on_opening(written):
    path = written.root / "shards/b.tar"
    size = path.stat().st_size
    path.write_bytes(bytes(size - 512))
    with pytest.raises(UserError, match=rf"b\.tar has {size - 512} bytes, {size} recorded.*verify"):
        open_manifest(written.root)
    path.unlink()
    with pytest.raises(UserError, match=rf"b\.tar is missing, {size} recorded"):
        open_manifest(written.root)


def test_a_cache_can_be_moved(tiny_cache, tmp_path):
    shutil.copytree(tiny_cache, tmp_path / "elsewhere")
    assert open_manifest(tmp_path / "elsewhere") == open_manifest(tiny_cache)


# ---- Conditioning.


def embeds(count: int, seed: int, xl: bool) -> TextEmbeds:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(count, 4, 6, generator=generator).half()
    return TextEmbeds(text, torch.randn(count, 5, generator=generator).half() if xl else None)


def same(a: TextEmbeds, b: TextEmbeds) -> bool:
    if (a.pooled_prompt_embeds is None) != (b.pooled_prompt_embeds is None):
        return False
    pooled = a.pooled_prompt_embeds is None or torch.equal(
        a.pooled_prompt_embeds, b.pooled_prompt_embeds
    )
    return pooled and torch.equal(a.prompt_embeds, b.prompt_embeds)


@pytest.mark.parametrize("xl", [False, True])
def test_prompts_are_found_by_their_text(cache, xl):
    empty, first, more = embeds(1, 0, xl), embeds(2, 1, xl), embeds(1, 2, xl)
    prompts = ("a red circle", 'naïve "☃"')
    stored = Conditioning(empty, prompts, first).with_prompts(["third"], more)
    save_conditioning(stored, cache.conditioning, cache.tmp)
    again = load_conditioning(cache.conditioning)
    assert again.prompts == (*prompts, "third")
    assert same(again.unconditional, empty)
    assert same(again.find(["third", prompts[0]]), TextEmbeds.cat([more, first[[0]]]))
    assert len(again.find(prompts)) == 2
    with pytest.raises(UserError, match=r"'a dog'.*python -m prep embed"):
        again.find([prompts[0], "a dog"])
    before = cache.conditioning.read_bytes()
    save_conditioning(again, cache.conditioning, cache.tmp)
    assert cache.conditioning.read_bytes() == before


def test_conditioning_that_is_missing_or_damaged(cache):
    with pytest.raises(UserError, match="does not exist"):
        load_conditioning(cache.conditioning)
    cache.root.mkdir()
    for content in (b"", b"\xff" * 100, (5).to_bytes(8, "little") + b"{}   "):
        cache.conditioning.write_bytes(content)
        with pytest.raises(UserError, match="is damaged") as error:
            load_conditioning(cache.conditioning)
        assert "\n" not in str(error.value)


def test_text_rows_are_taken_together(cache):
    rows = embeds(5, 0, xl=True)
    assert same(rows[1], rows[slice(1, 2)])
    assert same(rows[[4, 0, 4]], TextEmbeds.cat([rows[4], rows[0], rows[4]]))
    assert len(rows[[0] * 7]) == 7
    assert same(rows.to(torch.device("cpu")), rows)


# ---- Fingerprints.


def test_a_fingerprint_knows_the_weights_and_not_the_dtype_they_came_in():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).half()
    first = fingerprint(net)
    assert len(first) == 16
    assert fingerprint(net.float()) == first
    with torch.no_grad():
        net[0].weight[0, 0] += 1e-3
    assert fingerprint(net) != first
    renamed = nn.Sequential(nn.Identity(), *net)
    assert fingerprint(renamed) != fingerprint(net)
    with torch.no_grad():
        net[1].num_batches_tracked += 1
    assert fingerprint(renamed) == fingerprint(nn.Sequential(nn.Identity(), *net))
