"""The order of samples: each id once a pass, whatever the world, the batch and the moment."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from train.data.order import SHUFFLED, Order, permute

WORLDS = (1, 2, 3, 8)
# (samples, global batch): the batch divides by every world, and rarely divides the cache.
CACHES = [
    (1, 24), (2, 24), (23, 24), (24, 24), (25, 24), (1000, 24), (4999, 240),
    (SHUFFLED, 5016), (SHUFFLED + 1, 20_016), (100_003, 20_016),
]  # fmt: skip


def served(order: Order, batches: int, world: int, first: int = 0) -> np.ndarray:
    """Ids in the order in which the ranks together consume them."""
    parts = []
    for index in range(first, first + batches):
        ranks = [order.rank_batch(index, rank, world) for rank in range(world)]
        assert {bucket for bucket, _, _ in ranks} == {0}
        assert {len(ids) for _, ids, _ in ranks} == {order.batch_size // world}
        parts += [ids for _, ids, _ in ranks]
    return np.concatenate(parts)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("size", "batch"), CACHES)
def test_each_id_exactly_once_a_pass(size, batch, world):
    order = Order((size,), batch, seed=3)
    passes = 60 if size <= 24 else 2 if size <= SHUFFLED else 1
    stream = served(order, -(-passes * size // batch), world)
    for number in range(passes):
        ids = stream[number * size : (number + 1) * size]
        assert np.array_equal(np.sort(ids), np.arange(size))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 24, 36, 37, 100])
def test_batches_that_do_not_divide_the_cache(batch_size):
    order = Order((36,), batch_size, seed=0)
    stream = served(order, -(-36 * 4 // batch_size), 1)[: 36 * 4]
    assert np.array_equal(np.sort(stream.reshape(4, 36)), np.tile(np.arange(36), (4, 1)))


@pytest.mark.parametrize("size", [50, SHUFFLED + 1])
def test_the_stream_does_not_depend_on_batch_or_world(size):
    """One sequence of samples: batches and ranks only cut it up."""
    whole = Order((size,), 240, seed=9).batch(0)[1]
    for batch, world in ((24, 1), (24, 3), (48, 8), (120, 2)):
        assert np.array_equal(served(Order((size,), batch, 9), 240 // batch, world), whole)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sizes", [(1000,), (40, 500, 7)])
def test_rank_slices_together_are_the_global_batch(sizes, world):
    order = Order(sizes, 24, seed=1)
    for index in (0, 1, 41, 42, 1_000_000):
        bucket, ids = order.batch(index)
        parts = [order.rank_batch(index, rank, world) for rank in range(world)]
        assert {part[0] for part in parts} == {bucket}
        assert np.array_equal(np.concatenate([part[1] for part in parts]), ids)
        positions = np.concatenate([part[2] for part in parts])
        assert np.array_equal(positions, index * 24 + np.arange(24))


@pytest.mark.parametrize("sizes", [(77,), (SHUFFLED + 5,), (10, 300, 95)])
def test_any_batch_can_be_asked_for_first(sizes):
    """A resume asks for batch 500 without having seen the ones before."""
    indices = [0, 1, 2, 13, 14, 57, 500, 123_456]
    forward = [Order(sizes, 16, 5).batch(index) for index in indices]
    order = Order(sizes, 16, 5)
    backward = [order.batch(index) for index in reversed(indices)][::-1]
    for (a, ids), (b, again) in zip(forward, backward, strict=True):
        assert a == b
        assert np.array_equal(ids, again)


def test_the_order_is_this_one():
    """Runs of today must be resumable tomorrow: a change of the order is a change of format."""
    assert permute(np.arange(6), 6, (0, 0, 0)).tolist() == [2, 1, 5, 3, 0, 4]
    assert Order((10,), 4, seed=0).batch(1)[1].tolist() == [2, 1, 9, 7]
    assert [Order((5, 64, 300), 24, seed=2).batch(i)[0] for i in range(9, 12)] == [2, 1, 2]
    assert Order((100_003,), 4, seed=0).batch(7)[1].tolist() == [34090, 39228, 40942, 48843]


@pytest.mark.parametrize("size", [500, SHUFFLED + 1])
def test_passes_seeds_and_buckets_are_shuffled_differently(size):
    first, second = Order((size, size), size, 0), Order((size, size), size, 1)
    keys = ("first", 0, 0), ("first", 0, 1), ("first", 1, 0), ("second", 0, 0)
    orders = {"first": first, "second": second}
    passes = [orders[o].stream(b, e * size, (e + 1) * size) for o, b, e in keys]
    for i, a in enumerate(passes):
        assert (a == np.arange(size)).mean() < 0.02  # about one sample stays in its place
        for b in passes[:i]:
            assert (a == b).mean() < 0.02


# ---- Several buckets.


@pytest.mark.parametrize(
    ("sizes", "batch"), [((5, 64, 300), 24), ((1, 1, 1), 8), ((7,) * 5, 16), ((1000, 3), 12)]
)
def test_buckets_are_served_by_the_formula(sizes, batch):
    """Epoch e gives floor((e+1) n / B) - floor(e n / B) batches of a bucket, in mixed order."""
    order = Order(sizes, batch, seed=2)
    index = 0
    seen = {bucket: [] for bucket in range(len(sizes))}
    for epoch in range(batch):  # after B epochs every bucket has had exactly B passes
        counts = [(epoch + 1) * n // batch - epoch * n // batch for n in sizes]
        assert order.batches_before(epoch) == index
        drawn = [order.batch(i) for i in range(index, index + sum(counts))]
        index += sum(counts)
        assert [sum(b == bucket for b, _ in drawn) for bucket in range(len(sizes))] == counts
        for bucket, ids in drawn:
            assert len(ids) == batch
            seen[bucket].append(ids)
        for bucket, n in enumerate(sizes):
            ids = np.concatenate(seen[bucket]) if seen[bucket] else np.array([], dtype=int)
            assert ids.size == (epoch + 1) * n // batch * batch
            times = np.bincount(ids, minlength=n)
            assert times.size == n  # no id of another bucket
            assert times.max() - times.min() <= 1  # every id once a pass
    for bucket, n in enumerate(sizes):
        assert np.bincount(np.concatenate(seen[bucket])).tolist() == [batch] * n


def test_batches_of_buckets_are_mixed():
    order = Order((480, 480), 24, seed=0)
    epochs = [[order.batch(40 * e + i)[0] for i in range(40)] for e in range(4)]
    assert all(sorted(epoch) == [0] * 20 + [1] * 20 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    changes = sum(a != b for epoch in epochs for a, b in pairwise(epoch))
    assert 50 < changes < 110  # 80 expected of a fair shuffle; 4 if bucket followed bucket


# ---- Is the Feistel permutation a shuffle?

LARGE = [SHUFFLED + 1, 100_003, 2**18]


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("key", [(0, 0, 0), (0, 0, 1), (12345, 2, 7)])
def test_feistel_is_a_permutation_without_visible_pattern(size, key):
    ids = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(ids), np.arange(size))
    # Position and id: 64 x 64 cells, chi square with 63 * 63 degrees of freedom.
    position = np.arange(size)
    cells, _, _ = np.histogram2d(position, ids, bins=64, range=[[0, size]] * 2)
    expected = size / 64**2
    chi = ((cells - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(chi, 63**2) > 1e-6
    assert stats.chi2.cdf(chi, 63**2) > 1e-6  # nor too even
    for lag in (1, 2, 256, 257):  # neighbours in the stream are strangers in the cache
        r = np.corrcoef(ids[:-lag], ids[lag:])[0, 1]
        assert abs(r) < 5 / np.sqrt(size)
    assert abs(np.corrcoef(position, ids)[0, 1]) < 5 / np.sqrt(size)
    # Neighbours in the cache, which are often alike, do not come together in the stream.
    place = np.argsort(ids)
    distance = np.abs(np.diff(place))
    for reach in (1, 24, 256):
        near = 2 * reach / size * len(distance)
        assert abs((distance <= reach).sum() - near) < 6 * np.sqrt(near)
    # The parity of the permutation aside, low bits mix as well as high ones.
    low = np.histogram2d(position % 16, ids % 16, bins=16)[0]
    flat = size / 256
    assert stats.chi2.sf(((low - flat) ** 2 / flat).sum(), 15**2) > 1e-6


def test_each_epoch_sends_a_position_anywhere():
    size = SHUFFLED + 1
    places = [permute(np.array([0, 1]), size, (4, 0, epoch)) for epoch in range(800)]
    for column in np.transpose(places):
        counts = np.histogram(column, bins=16, range=(0, size))[0]
        assert stats.chisquare(counts).pvalue > 1e-6
    first, second = np.transpose(places)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(800)


def test_small_caches_get_every_permutation():
    """Few Feistel rounds would miss some; all 24 orders of 4 samples come about equally often."""
    seen = [tuple(permute(np.arange(4), 4, (0, 0, epoch)).tolist()) for epoch in range(2400)]
    counts = {order: seen.count(order) for order in set(seen)}
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-6
