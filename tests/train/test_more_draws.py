"""What an objective wants drawn besides: by (seed, position) alone, and nothing else changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from shared.cache.draws import DrawSpec, draw_more, generator
from tests.support.answers import write_answers
from tests.support.loader import cached_loader, equal, joined, make_cache, open_loader, take
from train.trainer.loop import micro_batches

SPEC = DrawSpec(
    seed=1, views=1, num_ddim_timesteps=50, w_min=2.0, w_max=14.0, proportion_empty_prompts=0.0,
    latent_noise=False, uniforms=3, noises=2,
)  # fmt: skip
SHAPES = [(7, 8, 8), (5, 4, 6), (9, 8, 8)]  # two buckets in three shards
MORE = {"uniforms": 3, "noises": 2}


@pytest.fixture
def cache(tmp_path):
    """Two views, up to three captions, posteriors."""
    return make_cache(tmp_path / "cache", SHAPES)


def drawn(spec: DrawSpec, positions: list[int], shape=(4, 8, 8)) -> dict[str, np.ndarray]:
    count = len(positions)
    arrays = {
        "uniforms": np.full((count, spec.uniforms), np.nan, np.float32),
        "noises": np.full((count, spec.noises, *shape), np.nan, np.float32),
    }
    draw_more(spec, positions, arrays)
    return arrays


def test_they_are_these():
    """Runs of today must be resumable tomorrow."""
    found = drawn(SPEC, [5])
    assert found["uniforms"][0] == pytest.approx([0.236668, 0.481286, 0.192792], abs=1e-6)
    assert found["noises"][0, 0, 0, 0, :3] == pytest.approx(
        [-0.869562, -1.315522, 0.354772], abs=1e-5
    )


def test_they_have_the_distributions_that_are_promised():
    found = drawn(SPEC, list(range(4000)), (2, 3, 3))
    uniforms, noises = found["uniforms"], found["noises"].reshape(4000, -1)
    assert (uniforms.min() >= 0, uniforms.max() < 1) == (True, True)
    assert stats.kstest(uniforms.ravel(), "uniform").pvalue > 1e-6
    assert stats.kstest(noises.ravel()[::7], "norm").pvalue > 1e-6
    columns = np.concatenate([uniforms, noises[:, :6]], axis=1)
    assert np.abs(np.corrcoef(columns.T) - np.eye(9)).max() < 5 / np.sqrt(4000)


def test_they_are_no_part_of_the_numbers_that_come_first():
    """Of another generator: not those that noise and guidance are made of, however many."""
    first = generator(SPEC, 5).random(10_000, dtype=np.float32)
    assert not np.isin(drawn(SPEC, [5])["uniforms"], first).any()


@pytest.mark.parametrize("answers", [False, True])
def test_a_batch_has_them_by_position_and_all_else_as_without(cache, answers):
    if answers:
        write_answers(cache, 2)
    opened = cached_loader if answers else open_loader
    loader = opened(cache, **MORE)
    assert (loader.spec.uniforms, loader.spec.noises) == (3, 2)
    for index, batch in enumerate(batches := take(loader, 12)):
        _, _, positions = loader.order.rank_batch(index, 0, 1)
        wanted = drawn(loader.spec, positions.tolist(), batch.noise.shape[1:])
        np.testing.assert_array_equal(batch.uniforms, wanted["uniforms"])
        np.testing.assert_array_equal(batch.noises, wanted["noises"])
    plain = take(opened(cache), 12)
    assert {(b.uniforms, b.noises) for b in plain} == {(None, None)}
    for with_more, without in zip(batches, plain, strict=True):
        assert equal(joined([replace(with_more, uniforms=None, noises=None)]), joined([without]))


@pytest.mark.parametrize("answers", [False, True])
def test_ranks_threads_and_resumes_give_the_same(cache, answers):
    if answers:
        write_answers(cache, 2)
    opened = cached_loader if answers else open_loader
    whole = take(opened(cache, **MORE), 9)
    for threads in (1, 5):
        parts = [take(opened(cache, rank=r, world=2, threads=threads, **MORE), 9) for r in (0, 1)]
        both = [joined(list(pair)) for pair in zip(*parts, strict=True)]
        assert all(equal(joined([a]), b) for a, b in zip(whole, both, strict=True))
    later = take(opened(cache, start=4, **MORE), 5)
    assert all(equal(joined([a]), joined([b])) for a, b in zip(whole[4:], later, strict=True))


def test_another_batch_size_gives_each_position_the_same(tmp_path):
    root = make_cache(tmp_path / "one-size", [(21, 8, 8)])
    few, many = (joined(take(open_loader(root, size, **MORE), 12 // size)) for size in (3, 6))
    assert few["uniforms"].shape == (12, 3)
    assert equal(few, many)


def test_answers_that_come_again_find_other_numbers(cache):
    write_answers(cache, 1)
    loader = cached_loader(cache, 21, **MORE)
    seen = [row for batch in take(loader, 4) for row in batch.uniforms.numpy()]
    assert len(np.unique(np.stack(seen), axis=0)) == len(seen) == 84


def test_micro_batches_are_parts_of_them(cache):
    (batch,) = take(open_loader(cache, **MORE), 1)
    parts = list(micro_batches(batch, 3))
    assert [part.noises.shape[:2] for part in parts] == [(2, 2)] * 3
    assert torch.equal(torch.cat([part.noises for part in parts]), batch.noises)
    assert torch.equal(torch.cat([part.uniforms for part in parts]), batch.uniforms)
