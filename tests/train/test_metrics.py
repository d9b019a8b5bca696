"""Fréchet distance against scipy, and what the picture features and the sharpness react to."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

from train.measures.frechet import Gaussian, frechet_distance
from train.measures.shapes import features, luma, portions
from train.measures.sharpness import high_frequency_share


def random_gaussian(rng, size=64, rank=None) -> Gaussian:
    rows = rng.standard_normal((rank or 5 * size, size)) * rng.uniform(0.1, 30, size)
    return Gaussian.of(rows + rng.normal(0, 10, size))


def reference(a: Gaussian, b: Gaussian) -> float:
    root = sqrtm(a.covariance @ b.covariance).real
    difference = a.mean - b.mean
    return difference @ difference + np.trace(a.covariance + b.covariance - 2 * root)


@pytest.fixture
def pictures(rng) -> np.ndarray:
    """Shapes with sharp edges on fields of colour."""
    images = np.empty((80, 64, 64, 3), np.uint8)
    for image in images:
        image[:] = rng.integers(0, 256, 3)
        top, left = rng.integers(4, 36, 2)
        image[top : top + 22, left : left + 22] = rng.integers(0, 256, 3)
    return images


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    soft = gaussian_filter(images.astype(float), (0, sigma, sigma, 0), mode="nearest")
    return soft.round().astype(np.uint8)


@pytest.mark.parametrize("size", [2, 16, 64])
def test_frechet_distance_is_scipys(rng, size):
    for _ in range(5):
        a, b = random_gaussian(rng, size), random_gaussian(rng, size)
        assert frechet_distance(a, b) == pytest.approx(reference(a, b), rel=1e-8)
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-8)


def test_large_pictures_are_measured_a_few_at_a_time(pictures, monkeypatch):
    """With the same result: what pictures of 1024 px would take all at once, no machine has."""
    assert len(portions(np.broadcast_to(np.uint8(0), (1000, 64, 64, 3)))) == 1
    assert len(portions(np.broadcast_to(np.uint8(0), (9, 1024, 1024, 3)))) == 3
    wanted = features(pictures), high_frequency_share(pictures)
    monkeypatch.setattr("train.measures.shapes.PORTION", 3 * 64 * 64)
    assert len(portions(pictures)) == 27
    np.testing.assert_allclose(features(pictures), wanted[0], rtol=1e-12)
    assert high_frequency_share(pictures) == pytest.approx(wanted[1], rel=1e-12)


def test_frechet_distance_of_known_gaussians():
    a = Gaussian(np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    b = Gaussian(np.array([1.0, 5.0]), np.diag([1.0, 16.0]))
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 4) ** 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_singular_covariances_are_no_trouble(rng):
    """Fewer pictures than features, or a feature that never changes."""
    a, b = random_gaussian(rng, 64, rank=10), random_gaussian(rng, 64)
    root = np.linalg.eigvals(a.covariance @ b.covariance).real.clip(min=0)
    wanted = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance)
    wanted -= 2 * np.sqrt(root).sum()
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    flat = Gaussian(np.zeros(64), np.zeros((64, 64)))
    assert frechet_distance(flat, flat) == 0


def test_gaussian_is_fitted_to_the_rows(rng):
    rows = rng.standard_normal((100, 64))
    fitted = Gaussian.of(rows)
    np.testing.assert_allclose(fitted.mean, rows.mean(0))
    np.testing.assert_allclose(fitted.covariance, np.cov(rows.T))


def test_features_are_64_numbers_a_picture(pictures):
    rows = features(pictures)
    assert rows.shape == (80, 64)
    assert rows.dtype == np.float64
    np.testing.assert_array_equal(features(pictures[3:4])[0], rows[3])  # each picture by itself
    for side in (30, 62, 128):  # any size
        assert features(np.zeros((1, side, side + 2, 3), np.uint8)).shape == (1, 64)


def test_features_of_a_known_picture():
    """Left half pure red, right half black: colours in the thumb, one edge in the middle."""
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[:, :, :8, 0] = 204  # 80 percent
    row = features(image)[0]
    thumb, edges = row[:48].reshape(4, 4, 3), row[48:].reshape(4, 4)
    np.testing.assert_allclose(thumb[:, :2], [[[80, 0, 0]] * 2] * 4)
    np.testing.assert_allclose(thumb[:, 2:], 0)
    step = 0.299 * 80  # a luma step in one of the four columns of a cell
    np.testing.assert_allclose(edges, [[0, step / 2, 0, 0]] * 4)


def test_recolouring_moves_the_thumb_and_not_the_edges(pictures):
    darker = features(pictures // 2)
    lighter = features(pictures // 2 + 51)
    np.testing.assert_allclose(lighter[:, :48] - darker[:, :48], 20)  # percent
    np.testing.assert_allclose(lighter[:, 48:], darker[:, 48:], atol=1e-9)


def test_blur_moves_the_edges_and_hardly_the_thumb(pictures):
    sharp, soft = features(pictures), features(blurred(pictures, 2))
    thumb, edges = abs(sharp - soft)[:, :48].mean(), (sharp - soft)[:, 48:].mean()
    assert edges > 0.4
    assert edges > thumb
    assert (sharp[:, 48:].sum(1) > soft[:, 48:].sum(1)).mean() > 0.95  # picture by picture


def test_distance_sees_blur_shift_and_wrong_colours(pictures, rng):
    real = Gaussian.of(features(pictures[:40].repeat(2, 0)))

    def distance(images):
        return frechet_distance(real, Gaussian.of(features(images)))

    same = distance(pictures[:40])
    assert distance(blurred(pictures[:40], 1)) > 2 * same + 0.2
    assert distance(blurred(pictures[:40], 3)) > distance(blurred(pictures[:40], 1))
    assert distance(255 - pictures[:40]) > 100
    assert distance(pictures[:40].clip(0, 200)) > same + 0.2


def test_blur_lowers_the_share_of_high_frequencies(pictures, rng):
    shares = [high_frequency_share(blurred(pictures, sigma)) for sigma in (0, 0.5, 1, 1.5)]
    assert shares == sorted(shares, reverse=True)
    assert shares[2] < 0.2 * shares[0]
    noisy = (pictures + rng.normal(0, 20, pictures.shape)).clip(0, 255).astype(np.uint8)
    assert high_frequency_share(noisy) > 2 * shares[0]


def test_high_frequencies_start_at_a_quarter_cycle_per_pixel():
    x = np.arange(64)

    def grating(period, axis):
        wave = 128 + 100 * np.cos(2 * np.pi * x / period)
        wave = wave[:, None] if axis == 0 else wave[None, :]
        return np.broadcast_to(wave[None, ..., None], (1, 64, 64, 3)).round().astype(np.uint8)

    for axis in (0, 1):
        assert high_frequency_share(grating(8, axis)) < 0.01
        assert high_frequency_share(grating(3.2, axis)) > 0.99
    # White noise has its energy spread evenly over the square of frequencies.
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3)).astype(np.uint8)
    disc = np.pi * 0.25**2
    assert high_frequency_share(noise) == pytest.approx(1 - disc, abs=0.02)


def test_luma_is_rec_601():
    assert luma(np.array([[255.0, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]])) == (
        pytest.approx([255, 76.245, 149.685, 29.07])
    )
