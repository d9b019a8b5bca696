"""What is measured on pictures: Fréchet distance, sharpness. Plain NumPy, nothing learned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The feature space's name stands in evaluation.json; a change of the features needs a new name.
FEATURES = "thumb48-edges16-percent"
THUMB = 4  # cells per side
FEATURE_COUNT = 4 * THUMB**2  # three colours and an edge for each cell
ENOUGH = 10 * FEATURE_COUNT  # pictures, for a covariance that is more than an impression
PORTION = 2**22  # pixels measured at once
HIGH_FREQUENCY = 0.25  # cycles per pixel; the Nyquist limit is 0.5


def features(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return `[N, 64]` features of RGB pictures `[N, H, W, 3]`, in percent of the full range.

    Of each cell of a 4 x 4 grid the mean colour (48 numbers), then the root mean square of the luma
    gradient (16). Colours and their places are in the first part, edges and their loss to blur in
    the second.
    """
    return np.concatenate([_features(portion) for portion in portions(images)])


def _features(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    pixels = images.astype(np.float64) / 2.55
    light = luma(pixels)
    down = np.diff(light, axis=1, append=light[:, -1:])
    right = np.diff(light, axis=2, append=light[:, :, -1:])
    edges = np.sqrt(cell_means((down**2 + right**2)[..., None]))
    parts = [cell_means(pixels), edges]
    return np.concatenate([part.reshape(len(images), -1) for part in parts], axis=1)


def portions(images: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """A few pictures at a time: in float64 a thousand of 1024 px would take 70 GB."""
    count = max(1, PORTION // (images.shape[1] * images.shape[2]))
    return [images[start : start + count] for start in range(0, len(images), count)]


def luma(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rec. 601 luma of `[..., 3]`."""
    weights: NDArray[np.float64] = np.array([0.299, 0.587, 0.114])
    return np.asarray(pixels @ weights)


def cell_means(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over a 4 x 4 grid of cells: `[N, H, W, C]` to `[N, 4, 4, C]`."""
    rows = np.array_split(pixels, THUMB, axis=1)
    cells = [[cell.mean((1, 2)) for cell in np.array_split(row, THUMB, axis=2)] for row in rows]
    return np.stack([np.stack(row, axis=1) for row in cells], axis=1)


@dataclass(frozen=True)
class Gaussian:
    """Mean `[64]` and covariance `[64, 64]` of features."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @staticmethod
    def of(rows: NDArray[np.float64]) -> Gaussian:
        """Fitted to features `[N, 64]`."""
        return Gaussian(rows.mean(0), np.cov(rows, rowvar=False))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) (Dowson and Landau, 1982)."""
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)
    difference = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross).sum()
    return float(difference @ difference + trace)


def few_pictures(count: int) -> str | None:
    """What to know of a Fréchet distance from `count` pictures, where they are few."""
    if count >= ENOUGH:
        return None
    entries = FEATURE_COUNT * (FEATURE_COUNT + 1) // 2
    return (
        f"Few pictures: {count} for {FEATURE_COUNT} features, whose covariance has "
        f"{entries:,} entries. A Fréchet distance from so few is biased "
        f"upwards and moves with the choice of captions: compare it only between rows of this "
        f"table, and take {ENOUGH} captions or more (better 1,000) to compare students."
    )


def high_frequency_share(images: NDArray[np.uint8]) -> float:
    """Share of the luma's energy, without its mean, above a quarter cycle per pixel.

    Blur lowers it. Summed over all pictures before dividing, so that flat ones do not count much.
    """
    frequency = np.hypot(
        np.fft.fftfreq(images.shape[1])[:, None], np.fft.fftfreq(images.shape[2])[None, :]
    )
    high = total = 0.0
    for portion in portions(images):
        light = luma(portion.astype(np.float64))
        spectrum = np.abs(np.fft.fft2(light - light.mean((1, 2), keepdims=True))) ** 2
        high += spectrum[:, frequency > HIGH_FREQUENCY].sum()
        total += spectrum.sum()
    return float(high / total)
