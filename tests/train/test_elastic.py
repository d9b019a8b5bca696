"""The same samples, places and draws, however a global batch is cut up and a run interrupted."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache.draws import DrawSpec
from shared.cache.layout import cache_layout
from shared.cache.manifest import open_manifest
from shared.cache.units import Shard
from tests.support.draws import draw
from train.data.bucket import first_samples, open_buckets
from train.data.order import Order

SPEC = DrawSpec(7, 2, 50, 1.0, 5.0, 0.3, latent_noise=False)
WORLDS = st.sampled_from([1, 2, 3, 4, 6, 12])


def consumed(order: Order, start: int, stop: int, world: int, accumulation: int) -> list[tuple]:
    """(bucket, id, position, draws) of global batches start..stop as the ranks train on them."""
    share = order.batch_size // world // accumulation
    found = []
    for index in range(start, stop):
        for rank in range(world):
            bucket, ids, positions = order.rank_batch(index, rank, world)
            assert len(ids) == share * accumulation
            for number, position in zip(ids.tolist(), positions.tolist(), strict=True):
                drawn = draw(SPEC, position, 3, (1, 2, 2))
                found.append((bucket, number, position, drawn.caption, drawn.index, drawn.w,
                              drawn.drop_caption, drawn.noise.tobytes()))  # fmt: skip
    return found


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.tuples(st.integers(0, 12), WORLDS), min_size=1, max_size=4),
)
def test_interruptions_and_worlds_change_nothing(sizes, seed, cuts):
    order = Order(tuple(sizes), 12, seed)
    found, done = [], 0
    for batches, world in cuts:
        # After a restart only the number of batches done is known.
        again = Order(tuple(sizes), 12, seed)
        found += consumed(again, done, done + batches, world, 12 // world)
        done += batches
    assert found == consumed(order, 0, done, 1, 1)
    assert [position for _, _, position, *_ in found] == list(range(12 * done))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    batch=st.integers(1, 24),
    seed=st.integers(0, 2**31),
)
def test_each_id_once_a_pass_of_its_bucket(sizes, batch, seed):
    order = Order(tuple(sizes), batch, seed)
    times = [np.zeros(size, int) for size in sizes]
    for epoch in range(1, 4):
        for index in range(order.batches_before(epoch - 1), order.batches_before(epoch)):
            bucket, ids = order.batch(index)
            assert len(ids) == batch
            np.add.at(times[bucket], ids, 1)
        # As many whole passes as fit, and of the pass that is under way no id twice.
        for size, seen in zip(sizes, times, strict=True):
            assert set(seen) <= {seen.sum() // size, -(-seen.sum() // size)}


def test_world_1_2_1_serves_each_id_exactly_once():
    order = Order((96,), 12, seed=3)
    parts = [(0, 3, 1), (3, 6, 2), (6, 8, 1)]
    found = [row for start, stop, world in parts for row in consumed(order, start, stop, world, 1)]
    assert sorted(number for _, number, *_ in found) == list(range(96))
    assert [position for _, _, position, *_ in found] == list(range(96))


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=5), limit=st.integers(1, 60))
def test_max_train_samples_takes_the_first_of_the_manifest(counts, limit):
    layout = cache_layout((1, 4, 8, 8), (1, 77, 64))
    shards = [Shard(f"{i}", layout, count, 0, "") for i, count in enumerate(counts)]
    whole = [(shard.file, i) for shard in shards for i in range(shard.count)]
    taken = [(shard.file, i) for shard in first_samples(shards, limit) for i in range(shard.count)]
    assert taken == whole[:limit]
    assert first_samples(shards, None) == shards


def test_a_limited_cache_serves_only_its_first_samples(tiny_cache):
    manifest = open_manifest(tiny_cache)
    (few,) = open_buckets(tiny_cache, manifest, max_samples=10)
    (whole,) = open_buckets(tiny_cache, manifest)
    assert (len(few), len(whole)) == (10, 72)
    assert [few.record(i) for i in range(10)] == [whole.record(i) for i in range(10)]
    assert set(Order((len(few),), 5, 0).stream(0, 0, 100)) == set(range(10))
    a, b = np.empty((4, 8, 8), "<f2"), np.empty((4, 8, 8), "<f2")
    few.read(9, "latents", 0, a)
    whole.read(9, "latents", 0, b)
    assert np.array_equal(a, b)
