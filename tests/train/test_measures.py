"""Feature spaces, distances, scorers and precision against formulas written anew in float64."""

import numpy as np
import pytest
from scipy.linalg import eigh, eigvalsh
from scipy.spatial.distance import cdist

from shared.errors import UserError
from tests.support import open_nsfw
from train.measures import precision_recall as measured
from train.measures.frechet import Frechet
from train.measures.mmd import MMD
from train.measures.precision_recall import precision_recall
from train.measures.scorers import open_scorer
from train.measures.shapes import features
from train.measures.space import digits, meaning, open_space


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def pictures(rng):
    """Fields of colour with a square each."""
    images = np.empty((12, 48, 48, 3), np.uint8)
    for image in images:
        image[:] = rng.integers(0, 256, 3)
        image[8:30, 8:30] = rng.integers(0, 256, 3)
    return images


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance by way of covariances, in float64."""
    ca, cb = np.cov(a.T), np.cov(b.T)
    values, vectors = eigh(ca)
    root = vectors @ np.diag(np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(eigvalsh(root @ cb @ root).clip(min=0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * cross


def test_shapes_is_what_a_plain_evaluation_uses(pictures):
    space = open_space()
    assert (space.name, space.title, space.weights) == ("shapes", "FD", None)
    np.testing.assert_array_equal(space.features(pictures), features(pictures))
    assert space.features(pictures).shape == (12, 64)
    assert space.distance(features(pictures), features(pictures)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (30, 45)])
def test_fewer_pictures_than_features_are_no_trouble(rng, n, m):
    """The way over inner products is the same distance as that over covariances."""
    a, b = rng.standard_normal((n, 60)), 1.3 * rng.standard_normal((m, 60)) + 0.2
    assert Frechet()(a, b) == pytest.approx(by_scipy(a, b), rel=1e-7)


@pytest.mark.parametrize("width", [5, 90])
def test_drawn_again_is_the_distance_of_those_rows(rng, width):
    """Both ways: from covariances, and from inner products of the different rows."""
    a, b = rng.standard_normal((2, 40, width))
    draws = rng.integers(40, size=(3, 40))
    found = Frechet().resampled(a, b, draws)
    wanted = [by_scipy(a[draw], b[draw]) for draw in draws]
    np.testing.assert_allclose(found, wanted, rtol=1e-7)


def mmd_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Jayasumana et al. 2024, from their words: sigma 10, biased, times 1000."""

    def mean_kernel(x, y):
        return np.exp(-cdist(x, y, "sqeuclidean") / (2 * 10**2)).mean()

    return 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))


def test_mmd_is_that_of_cmmd(rng, monkeypatch):
    a, b = rng.standard_normal((50, 16)), rng.standard_normal((50, 16)) + 0.3
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    assert MMD()(a, b) == pytest.approx(mmd_by_hand(a, b), rel=1e-9)
    assert MMD()(a, a) == pytest.approx(0, abs=1e-9)
    assert MMD()(a, b[:20]) == pytest.approx(mmd_by_hand(a, b[:20]), rel=1e-9)
    monkeypatch.setattr("train.measures.mmd.PORTION", 7)  # rows at once
    assert MMD()(a, b) == pytest.approx(mmd_by_hand(a, b), rel=1e-9)
    draws = rng.integers(50, size=(3, 50))
    wanted = [mmd_by_hand(a[draw], b[draw]) for draw in draws]
    np.testing.assert_allclose(MMD().resampled(a, b, draws), wanted, rtol=1e-9)


def test_precision_and_recall_are_those_of_kynkaanniemi(rng, monkeypatch):
    real, drawn = rng.standard_normal((60, 4)), 0.6 * rng.standard_normal((50, 4)) + 0.4

    def among(points, others):
        reach = np.sort(cdist(others, others), axis=1)[:, 3]  # column 0 is the row itself
        return (cdist(points, others) <= reach).any(1)

    for portion in (2**22, 100):
        monkeypatch.setattr(measured, "PORTION", portion)
        found = precision_recall(real, drawn)
        np.testing.assert_array_equal(found[0], among(drawn, real))
        np.testing.assert_array_equal(found[1], among(real, drawn))
    assert found[0].mean() > found[1].mean()  # they are true, and not all that there is
    assert all(part.all() for part in precision_recall(real, real))
    assert not any(part.any() for part in precision_recall(real, real + 100))


def test_few_pictures_depend_on_the_features():
    frechet = Frechet()
    assert frechet.few_pictures(640, 64) is None
    assert "639 for 64 features" in frechet.few_pictures(639, 64)
    assert "640 captions or more (better 1,000)" in frechet.few_pictures(639, 64)
    assert "20,480 captions or more to" in frechet.few_pictures(1000, 2048)
    assert MMD().few_pictures(2, 768) is None


def test_titles_tell_what_a_distance_is():
    assert meaning("FD") == meaning("FD-DINOv2") == meaning("FID") == "Fréchet distance"
    assert "discrepancy" in meaning("CMMD")
    assert (digits("FD"), digits("CMMD")) == (".1f", ".3f")


def test_a_learned_space_of_ones_own(rng, pictures):
    """The 1,024 features of a network that is here, and their distance against scipy's."""
    space = open_space("tests.support.open_nsfw:features")
    assert (space.name, space.title) == ("tests.support.open_nsfw:features", "FD")
    pictures = pictures[:6]
    rows = space.features(pictures)
    assert rows.shape == (6, 1024)
    assert rows.dtype == np.float64
    np.testing.assert_allclose(rows[:1], open_nsfw.features(pictures[:1]), rtol=1e-6)
    blue = pictures.copy()
    blue[..., 2] = 255
    other = space.features(blue)
    assert space.distance(rows, other) == pytest.approx(by_scipy(rows, other), rel=1e-5)
    assert space.distance(rows, other) > 1
    assert space.distance(rows, rows) == pytest.approx(0, abs=1e-6 * (rows**2).sum())


MISTAKES = [
    ("thumb", "shapes, inception, dinov2, clip or MODULE:FUNCTION"),
    ("no_such_module:f", "No module named 'no_such_module'"),
    ("json:nothing", "has no attribute 'nothing'"),
    ("json:__name__", "it is no function"),
    ("shapes:somewhere", "has no weights"),
    ("dinov2:no/such/folder", "there is no folder no/such/folder"),
]


@pytest.mark.parametrize(("name", "said"), MISTAKES, ids=[name for name, _ in MISTAKES])
def test_a_space_that_is_not_there(name, said):
    with pytest.raises(UserError) as caught:
        open_space(name)
    assert said in str(caught.value)
    assert "--features" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_function_must_give(tmp_path, monkeypatch, pictures):
    (tmp_path / "odd_measures.py").write_text(
        "import numpy as np\n"
        "flat = lambda images: np.zeros(len(images))\n"
        "endless = lambda images: np.full((len(images), 2), np.inf)\n"
        "one = lambda images, captions: 1.0\n"
        "nan = lambda images, captions: [float('nan')] * len(images)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, said in (("flat", "shape [12]"), ("endless", "finite")):
        with pytest.raises(UserError, match="--features") as caught:
            open_space(f"odd_measures:{name}").features(pictures)
        assert said in str(caught.value)
    for name, said in (("one", "shape []"), ("nan", "finite")):
        with pytest.raises(UserError, match="--scorer") as caught:
            open_scorer(f"odd_measures:{name}")(pictures, ["a"] * 12)
        assert said in str(caught.value)
    # A file that was edited makes other features.
    before = open_space("odd_measures:flat").weights
    (tmp_path / "odd_measures.py").write_text("flat = len\n")
    assert open_space("odd_measures:flat").weights != before


def test_a_scorer_that_is_not_there():
    assert open_scorer(None) is None
    with pytest.raises(UserError, match=r"--scorer clip: .*clip-score, pickscore or MODULE"):
        open_scorer("clip")
