"""The random numbers of a sample: a function of (seed, position), with the right distributions."""

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from shared.cache.draws import DrawSpec
from tests.support.draws import Draw, draw

SPEC = DrawSpec(
    seed=1, views=3, num_ddim_timesteps=50, w_min=2.0, w_max=14.0, proportion_empty_prompts=0.25,
    latent_noise=True,
)  # fmt: skip
SHAPE = (4, 8, 8)


def same(a: Draw, b: Draw) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Draw))


@pytest.fixture(scope="module")
def many() -> list[Draw]:
    return [draw(SPEC, position, 2, SHAPE) for position in range(4000)]


def test_a_draw_depends_on_seed_and_position_alone():
    first = draw(SPEC, 77, 2, SHAPE)
    for position in (3, 77, 12):  # drawing others in between does not matter
        again = draw(SPEC, position, 2, SHAPE)
        assert same(again, first) == (position == 77)
    assert not np.array_equal(draw(replace(SPEC, seed=2), 77, 2, SHAPE).noise, first.noise)


def test_the_draws_are_these():
    """Runs of today must be resumable tomorrow."""
    drawn = draw(SPEC, 5, 2, SHAPE)
    found = (drawn.view, drawn.caption, drawn.drop_caption, drawn.index, round(drawn.w, 4))
    assert found == (2, 1, False, 12, 4.4363)
    assert drawn.noise[0, 0, :3] == pytest.approx([0.8535, -1.4694, -0.9239], abs=1e-4)
    assert drawn.latent_noise[0, 0, :2] == pytest.approx([-1.49988, 1.641145], abs=1e-5)


def test_noise_is_standard_normal_and_new_for_every_sample(many):
    noise = np.stack([d.noise for d in many])
    assert noise.dtype == np.float32
    assert noise.shape == (4000, *SHAPE)
    assert stats.kstest(noise.ravel()[::7], "norm").pvalue > 1e-6
    for a, b in pairwise(many):
        assert not np.array_equal(a.noise, b.noise)
        assert not np.array_equal(a.noise, a.latent_noise)
    flat = noise.reshape(4000, -1)
    next_one = (flat[:-1] * flat[1:]).mean()  # neighbours in the stream are uncorrelated
    assert abs(next_one) < 5 / np.sqrt(flat[1:].size)
    latent = np.stack([d.latent_noise for d in many]).reshape(4000, -1)
    assert abs((flat * latent).mean()) < 5 / np.sqrt(flat.size)
    assert stats.kstest(latent.ravel()[::7], "norm").pvalue > 1e-6


def test_interval_view_and_caption_are_uniform(many):
    for name, count in (("index", 50), ("view", 3), ("caption", 2)):
        counts = np.bincount([getattr(d, name) for d in many], minlength=count)
        assert len(counts) == count
        assert stats.chisquare(counts).pvalue > 1e-6


def test_guidance_is_uniform_and_independent_of_the_interval(many):
    w = np.array([d.w for d in many])
    assert stats.kstest((w - 2) / 12, "uniform").pvalue > 1e-6
    index = [d.index for d in many]
    assert abs(np.corrcoef(w, index)[0, 1]) < 5 / np.sqrt(4000)


def test_captions_are_dropped_as_often_as_asked(many):
    assert np.mean([d.drop_caption for d in many]) == pytest.approx(0.25, abs=0.04)
    for share in (0.0, 1.0):
        spec = replace(SPEC, proportion_empty_prompts=share)
        assert {draw(spec, p, 2, SHAPE).drop_caption for p in range(300)} == {bool(share)}


def test_one_guidance_value_is_allowed():
    spec = replace(SPEC, w_min=3.0, w_max=3.0)
    assert draw(spec, 0, 1, SHAPE).w == 3.0


def test_a_cache_of_means_draws_no_latent_noise():
    assert draw(replace(SPEC, latent_noise=False), 0, 1, SHAPE).latent_noise is None
