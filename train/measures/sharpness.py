"""How sharp pictures are: the share of their energy in high frequencies."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from train.measures.shapes import luma, portions

HIGH_FREQUENCY = 0.25  # cycles per pixel; the Nyquist limit is 0.5


def high_frequency_share(images: NDArray[np.uint8]) -> float:
    """Share of the luma's energy, without its mean, above a quarter cycle per pixel.

    Blur lowers it. Summed over all pictures before dividing, so that flat ones do not count much.
    """
    return share(energies(images))


def share(energies: NDArray[np.float64]) -> float:
    """The share of the first column of `[N, 2]` in the second, over all rows."""
    high, total = energies.sum(0)
    return float(high / total)


def energies(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Energy of high frequencies and of all of each picture: `[N, H, W, 3]` to `[N, 2]`."""
    frequency = np.hypot(
        np.fft.fftfreq(images.shape[1])[:, None], np.fft.fftfreq(images.shape[2])[None, :]
    )
    found = []
    for portion in portions(images):
        light = luma(portion.astype(np.float64))
        spectrum = np.abs(np.fft.fft2(light - light.mean((1, 2), keepdims=True))) ** 2
        high = spectrum[:, frequency > HIGH_FREQUENCY].sum(1)
        found.append(np.stack([high, spectrum.sum((1, 2))], axis=1))
    return np.concatenate(found)
