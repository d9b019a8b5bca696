"""The feature space `shapes`: colours and edges on a grid. Plain NumPy, nothing learned."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# The name stands in evaluation.json; a change of the features needs a new one.
SHAPES = "shapes"
FORMERLY = "thumb48-edges16-percent"  # what earlier versions call the same features
THUMB = 4  # cells per side
FEATURE_COUNT = 4 * THUMB**2  # three colours and an edge for each cell
PORTION = 2**22  # pixels measured at once


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
