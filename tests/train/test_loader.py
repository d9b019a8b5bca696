"""Batches hold what the cache holds, as stock webdataset reads it from the same shards."""

import threading
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
import webdataset

from shared.cache.manifest import open_manifest
from tests.support.draws import draw
from tests.support.loader import (
    SCALE,
    SENTINEL,
    equal,
    joined,
    joined_by_size,
    make_cache,
    open_loader,
    take,
)
from train.data.batch import Batch


def stock_samples(root, bucket: int = 0) -> list[dict]:
    """A bucket's samples as stock webdataset decodes them, in the order of the manifest."""
    manifest = open_manifest(root)
    samples = []
    for shard in manifest.shards:
        if shard.layout == manifest.layouts[bucket]:
            samples += webdataset.WebDataset([str(root / shard.file)], shardshuffle=False).decode()
    return samples


@pytest.fixture
def posterior(tmp_path):
    """Two shards of 8 x 8 latents and one of 4 x 6, two views, up to three captions, SDXL."""
    return make_cache(tmp_path / "cache", [(7, 8, 8), (5, 4, 6), (9, 8, 8)])


@pytest.mark.parametrize("cache", ["tiny_cache", "tiny_xl_cache"])
def test_batches_hold_what_stock_webdataset_reads(cache, request):
    root = request.getfixturevalue(cache)
    loader = open_loader(root, batch_size=5)
    stock = stock_samples(root)
    scale = open_manifest(root).identity.vae.scaling_factor
    batches = take(loader, 2 * len(stock) // 5)  # two passes
    for index, batch in enumerate(batches):
        _, ids, positions = loader.order.rank_batch(index, 0, 1)
        for row, (number, position) in enumerate(zip(ids, positions, strict=True)):
            sample = stock[number]
            drawn = draw(loader.spec, int(position), 1, batch.noise.shape[1:])
            values = sample["latents.npy"][0].astype(np.float32)
            if drawn.latent_noise is None:  # tiny_cache holds means
                np.testing.assert_array_equal(batch.latents[row], values * np.float32(scale))
            else:
                wanted = scale * (values[:4] + np.exp(values[4:] / 2) * drawn.latent_noise)
                np.testing.assert_allclose(batch.latents[row], wanted, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(batch.prompt_embeds[row], sample["prompt_embeds.npy"][0])
            if "time_ids.npy" in sample:
                np.testing.assert_array_equal(batch.time_ids[row], sample["time_ids.npy"][0])
                pooled = sample["pooled_prompt_embeds.npy"][0]
                np.testing.assert_array_equal(batch.pooled_prompt_embeds[row], pooled)
            else:
                assert batch.time_ids is batch.pooled_prompt_embeds is None
            np.testing.assert_array_equal(batch.noise[row], drawn.noise)
            assert (int(batch.index[row]), float(batch.w[row])) == (
                drawn.index, pytest.approx(drawn.w)
            )  # fmt: skip
    kinds = {f.name: getattr(batches[0], f.name) for f in fields(Batch)}
    dtypes = {name: value.dtype for name, value in kinds.items() if value is not None}
    assert dtypes["latents"] == dtypes["noise"] == dtypes["w"] == torch.float32
    assert dtypes["prompt_embeds"] == torch.float16


def test_posteriors_are_sampled_views_and_captions_drawn(posterior):
    loader = open_loader(posterior)
    manifest = open_manifest(posterior)
    stock = [stock_samples(posterior, bucket) for bucket in range(len(manifest.layouts))]
    views, captions = set(), set()
    for index, batch in enumerate(take(loader, 30)):
        bucket, ids, positions = loader.order.rank_batch(index, 0, 1)
        for row, (number, position) in enumerate(zip(ids, positions, strict=True)):
            sample = stock[bucket][number]
            drawn = draw(loader.spec, int(position), sample["json"]["num_captions"],
                         batch.noise.shape[1:])  # fmt: skip
            mean, logvar = np.split(sample["latents.npy"][drawn.view].astype(np.float64), 2)
            wanted = SCALE * (mean + np.exp(logvar / 2) * drawn.latent_noise)
            np.testing.assert_allclose(batch.latents[row], wanted, rtol=1e-5, atol=1e-5)
            text = sample["prompt_embeds.npy"][drawn.caption]
            np.testing.assert_array_equal(batch.prompt_embeds[row], text)
            assert SENTINEL not in batch.prompt_embeds[row]
            assert SENTINEL not in batch.pooled_prompt_embeds[row]
            # int32 all the way; the picture's own row of the same view
            assert batch.time_ids[row].tolist() == sample["time_ids.npy"][drawn.view].tolist()
            assert batch.time_ids[row, 0] == 1023
            views.add(drawn.view)
            captions.add(drawn.caption)
    assert (views, captions) == ({0, 1}, {0, 1, 2})


def test_each_pass_draws_fresh_vae_noise_around_the_mean(tmp_path):
    root = make_cache(tmp_path / "cache", [(1, 8, 8)])
    batch = joined(take(open_loader(root, batch_size=8), 60))
    mean, logvar = np.split(stock_samples(root)[0]["latents.npy"].astype(float), 2, axis=1)
    view = batch["time_ids"][:, 3].numpy()
    deviations = (batch["latents"].numpy() / SCALE - mean[view]) / np.exp(logvar[view] / 2)
    assert deviations.mean() == pytest.approx(0, abs=0.02)
    assert deviations.std() == pytest.approx(1, abs=0.02)
    assert len(np.unique(deviations[:, 0, 0, 0])) == 480


def test_no_batch_mixes_latent_sizes(posterior):
    batches = take(open_loader(posterior, batch_size=4), 40)
    sizes = [tuple(batch.latents.shape[2:]) for batch in batches]
    assert set(sizes) == {(8, 8), (4, 6)}
    for batch, (height, width) in zip(batches, sizes, strict=True):
        assert batch.noise.shape == (4, 4, height, width)
        shards = {int(row[5]) for row in batch.time_ids}
        assert shards <= ({1} if (height, width) == (4, 6) else {0, 2})


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_do_not_matter(posterior, threads):
    one = joined_by_size(take(open_loader(posterior, threads=1), 20))
    other = joined_by_size(take(open_loader(posterior, threads=threads), 20))
    assert all(equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_are_one_process(tiny_cache, world):
    whole = joined(take(open_loader(tiny_cache, batch_size=6), 8))
    ranks = [
        take(open_loader(tiny_cache, batch_size=6, rank=r, world=world), 8) for r in range(world)
    ]
    woven = [batch for together in zip(*ranks, strict=True) for batch in together]
    assert equal(joined(woven), whole)


def test_batch_size_does_not_matter(tiny_cache):
    whole = joined(take(open_loader(tiny_cache, batch_size=12), 4))
    for batch_size in (1, 2, 8):
        parts = take(open_loader(tiny_cache, batch_size=batch_size), 48 // batch_size)
        assert equal(joined(parts), whole)


def test_a_resumed_stream_goes_on_where_it_stopped(posterior):
    whole = take(open_loader(posterior), 25)
    for start in (1, 7, 19):
        rest = take(open_loader(posterior, start=start), 25 - start)
        pairs = zip(rest, whole[start:], strict=True)
        assert all(equal(joined([a]), joined([b])) for a, b in pairs)


def test_another_seed_is_another_stream(tiny_cache):
    a, b = (joined(take(open_loader(tiny_cache, batch_size=8, seed=s), 9)) for s in (0, 1))
    assert not any(torch.equal(a[name], b[name]) for name in a)
    # the same 72 samples all the same
    assert torch.equal(a["latents"].sum((1, 2, 3)).sort()[0], b["latents"].sum((1, 2, 3)).sort()[0])


@pytest.mark.parametrize("xl", [True, False])
def test_dropped_captions_become_the_unconditional_embedding(tmp_path, xl):
    root = make_cache(tmp_path / "cache", [(9, 4, 4)], xl=xl)
    plain = joined(take(open_loader(root), 20))
    for share in (1.0, 0.4):
        loader = open_loader(root, drop=share)
        batch = joined(take(loader, 20))
        dropped = (batch["prompt_embeds"] == 7).flatten(1).all(1)
        assert dropped.double().mean() == pytest.approx(share, abs=0.15)
        assert torch.equal(batch["prompt_embeds"][~dropped], plain["prompt_embeds"][~dropped])
        if xl:
            assert torch.equal((batch["pooled_prompt_embeds"] == 8).all(1), dropped)
            assert torch.equal(batch["time_ids"], plain["time_ids"])
        for name in ("latents", "noise", "index", "w"):
            assert torch.equal(batch[name], plain[name])
    assert not (plain["prompt_embeds"] == 7).flatten(1).all(1).any()


def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for(posterior):
    batches = iter(open_loader(posterior, threads=4))
    for _ in range(12):
        batch = next(batches)
        before = joined([batch])
        time.sleep(0.02)  # all that is read ahead lands meanwhile
        assert equal(joined([batch]), before)
    batches.close()


def test_leaving_early_ends_the_threads(posterior):
    batches = iter(open_loader(posterior, threads=3))
    next(batches)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())
