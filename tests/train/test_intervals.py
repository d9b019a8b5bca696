"""Intervals by the bootstrap: do they cover the truth as often as they say?"""

import numpy as np
import pytest

from train.measures.figures import of_distance, of_mean, of_sharpness
from train.measures.frechet import Gaussian, frechet_distance
from train.measures.mmd import MMD
from train.measures.space import Space, open_space

TRIALS = 120
# Of 120 intervals that cover the truth 95 times of 100, this many cover it with 99% probability.
OFTEN = range(107, 120)


def pairs(rng, count, size, scale, shift, together):
    """Features of real and drawn pictures, row by row alike in part, and their distance."""
    spread = np.linspace(0.5, 2, size)
    real = rng.standard_normal((count, size))
    drawn = together * real + np.sqrt(1 - together**2) * rng.standard_normal((count, size))
    return real * spread, scale * drawn * spread + shift


def true_distance(size, scale, shift) -> float:
    """Between the two Gaussians, whose covariances commute."""
    spread = np.linspace(0.5, 2, size)
    return size * shift**2 + ((spread - scale * spread) ** 2).sum()


@pytest.mark.slow
@pytest.mark.parametrize("together", [0.0, 0.7])
def test_distances_of_known_gaussians_are_covered(together):
    """Around the figure lies what so many pictures give on average; less the bias, the truth."""
    rng, size, scale, shift = np.random.default_rng(1), 12, 1.5, 0.3
    found = [
        of_distance(open_space(), *pairs(rng, 150, size, scale, shift, together))
        for _ in range(TRIALS)
    ]
    truth, average = true_distance(size, scale, shift), np.mean([one.value for one in found])
    spread = np.linspace(0.5, 2, size)
    exact = frechet_distance(
        Gaussian(np.zeros(size), np.diag(spread**2)),
        Gaussian(np.full(size, shift), np.diag((scale * spread) ** 2)),
    )
    assert exact == pytest.approx(truth)
    bias = np.mean([one.bias for one in found])
    assert average - truth == pytest.approx(bias, rel=0.35)
    assert bias > 0.05 * truth
    assert sum(low <= average <= high for low, high in (one.interval for one in found)) in OFTEN
    less = [(one.interval[0] - one.bias, one.interval[1] - one.bias) for one in found]
    assert sum(low <= truth <= high for low, high in less) in OFTEN
    # And the bias is no trifle.
    assert sum(low <= truth <= high for low, high in (one.interval for one in found)) < OFTEN[0]


def test_where_nothing_is_apart_the_interval_is_no_narrower():
    """Both from one distribution: chance is all that the distance shows, and the bias says so."""
    rng = np.random.default_rng(2)
    found = [of_distance(open_space(), *pairs(rng, 120, 4, 1, 0, 0.0)) for _ in range(60)]
    assert np.mean([one.value for one in found]) > 0.1
    assert all(one.interval[0] - one.bias <= 0 <= one.interval[1] - one.bias for one in found)
    assert all(one.interval[0] >= 0 for one in found)


def test_maximum_mean_discrepancies_are_covered():
    rng = np.random.default_rng(3)
    space = Space("clip", "CMMD", lambda images: images, MMD())
    found = [of_distance(space, *pairs(rng, 80, 3, 1, 2.0, 0.5)) for _ in range(TRIALS)]
    average = np.mean([one.value for one in found])
    assert sum(low <= average <= high for low, high in (one.interval for one in found)) in OFTEN


def test_shares_are_covered():
    """What a scorer that says right or wrong gives."""
    rng = np.random.default_rng(4)
    found = [of_mean((rng.uniform(size=200) < 0.7).astype(float)) for _ in range(TRIALS)]
    assert sum(low <= 0.7 <= high for low, high in (one.interval for one in found)) in OFTEN


def test_sharpness_is_relative_to_the_same_captions():
    """A student as sharp as its teacher, picture by picture, leaves nothing to chance."""
    rng = np.random.default_rng(5)
    energies = rng.uniform(1, 9, (100, 1)) * [[0.2, 1.0]] * rng.uniform(0.5, 2, (100, 2))
    same = of_sharpness(energies, energies)
    assert (same.value, same.interval) == (1, (1, 1))
    other = of_sharpness(energies * [[0.5, 1]], energies[::-1])
    assert other.value == pytest.approx(0.5)
    assert other.interval[0] < 0.5 < other.interval[1]


def test_the_same_figures_have_the_same_intervals():
    rows = np.random.default_rng(6).standard_normal((2, 70, 8))
    assert of_distance(open_space(), *rows) == of_distance(open_space(), *rows)
    assert of_mean(rows[0, :, 0]) == of_mean(rows[0, :, 0])
    assert of_mean(np.ones(9)).interval == (1, 1)
