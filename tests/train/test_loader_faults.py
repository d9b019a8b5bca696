"""Damage of a shard is fatal and named, at the batch that it concerns."""

import numpy as np
import pytest

from shared.cache.manifest import open_manifest
from shared.errors import UserError
from tests.support.loader import equal, joined, make_cache, open_loader, take


@pytest.fixture
def posterior(tmp_path):
    """Two shards of 8 x 8 latents and one of 4 x 6, two views, up to three captions, SDXL."""
    return make_cache(tmp_path / "cache", [(7, 8, 8), (5, 4, 6), (9, 8, 8)])


def sample_place(root, shard: int, number: int, name: str) -> tuple:
    """Path of a shard and the offset of a sample's field in it."""
    manifest = open_manifest(root)
    layout = manifest.shards[shard].layout
    return root / manifest.shards[shard].file, number * layout.stride + layout.offsets[name]


@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "pooled_prompt_embeds"])
def test_a_non_finite_sample_is_named(posterior, name):
    path, offset = sample_place(posterior, 2, 4, name)
    manifest = open_manifest(posterior)
    field = manifest.shards[2].layout.field(name)
    with path.open("r+b") as file:  # the whole field, so that every view and caption shows it
        file.seek(offset)
        file.write(np.full(field.shape, np.nan, field.dtype).tobytes())
    with pytest.raises(UserError, match=r"unit2\.tar sample 4 holds non-finite values"):
        take(open_loader(posterior), 30)


def test_a_shard_cut_while_training_is_named(posterior):
    loader = open_loader(posterior)
    path, offset = sample_place(posterior, 2, 4, "prompt_embeds")
    with path.open("r+b") as file:
        file.truncate(offset + 10)
    with pytest.raises(UserError, match=r"unit2\.tar sample [45678] is cut short"):
        take(loader, 30)


def test_a_shard_cut_before_training_is_refused_at_once(posterior):
    path, offset = sample_place(posterior, 0, 3, "latents")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(offset)
    with pytest.raises(UserError, match=rf"unit0\.tar has {offset} bytes, {size} recorded"):
        open_loader(posterior)
    path.unlink()
    with pytest.raises(UserError, match=r"unit0\.tar is missing"):
        open_loader(posterior)


def test_error_comes_at_the_damaged_batch_not_before(posterior):
    """What was read ahead must not take down the steps before it."""
    loader = open_loader(posterior, batch_size=1, threads=4)
    good = take(loader, 9)
    order = [loader.order.rank_batch(i, 0, 1) for i in range(9)]
    bucket, ids, _ = order[8]
    shard, start = loader.buckets[bucket].locate(int(ids[0]))
    path = loader.buckets[bucket].paths[shard]
    earlier = [(b, int(i[0])) for b, i, _ in order[:8]]
    assert (bucket, int(ids[0])) not in earlier
    layout = loader.buckets[bucket].layout
    with path.open("r+b") as file:
        file.seek(start + layout.offsets["latents"])
        file.write(np.full(layout.fields[0].shape, np.inf, "<f2").tobytes())
    batches = iter(loader)
    for wanted in good[:8]:
        assert equal(joined([next(batches)]), joined([wanted]))
    with pytest.raises(UserError, match="non-finite"):
        next(batches)
