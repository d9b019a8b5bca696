"""Reads a picture of the shapes world by plain image analysis: no learned network.

    python -m train evaluate --scorer data.oracle:score ...     # prompt accuracy of a student
    python -m data.oracle                                       # the oracle's own accuracy

The field is the plane of light fitted to the border, the figure is what differs from it, its colour
is the median of its core, and its shape is the one whose outline overlaps it best.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.shapes import COLOURS, POSITIONS, SHAPES, SIZES, Scene, contains, parse

_NAMES = list(COLOURS)
_PALETTE = np.asarray(list(COLOURS.values()), dtype=np.float64)
_SIZE_BOUNDARY = (SIZES["small"][1] + SIZES["large"][0]) / 2
_MIN_AREA = 0.012  # of the picture; the thinnest small shape covers 0.03
_MIN_OVERLAP = 0.6  # intersection over union; a blob that looks like nothing is nothing


def score(images: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float64]:
    """1.0 where a picture shows all that its caption names, else 0.0.

    images: RGB `[N, H, W, 3]` uint8, square. Raises ValueError for a caption of another world.
    """
    return np.asarray(
        [
            float(agrees(parse(text), read(image)))
            for image, text in zip(images, captions, strict=True)
        ]
    )


def agrees(said: Scene, seen: Scene | None) -> bool:
    """Does the picture show everything the caption names? What it leaves open may be anything."""
    return (
        seen is not None
        and (said.shape, said.colour, said.background) == (seen.shape, seen.colour, seen.background)
        and said.size in (None, seen.size)
        and said.position in (None, seen.position)
    )


def read(image: NDArray[np.uint8]) -> Scene | None:
    """The scene in a square RGB picture `[H, W, 3]`, or None where there is no clear shape."""
    pixels = image.astype(np.float64)
    side = pixels.shape[0]
    ground = field(pixels)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    strongest = np.quantile(distance, 1 - _MIN_AREA)
    mask = distance > max(strongest / 2, 30.0)
    if mask.mean() < _MIN_AREA:
        return None
    core = pixels[distance >= np.median(distance[mask])]
    shape, centre, radius = _outline(mask)
    if shape is None:
        return None
    return Scene(
        shape=shape,
        colour=_nearest_colour(np.median(core, axis=0)),
        background=_nearest_colour(np.median(ground, axis=(0, 1))),
        size="small" if radius / side < _SIZE_BOUNDARY else "large",
        position=_nearest_position(centre / side),
    )


def field(
    pixels: NDArray[np.float64], covered: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """The evenly shaded field `[H, W, 3]`: a plane fitted to the border, outliers left out.

    Pixels that are `covered`, `[H, W]`, are no part of the border.
    """
    height, width, _ = pixels.shape
    side = max(height, width)
    v, u = np.mgrid[0:height, 0:width] / side
    plane = np.stack([np.ones_like(u), u, v], axis=-1)
    rim = np.minimum.reduce([u * side, v * side, width - 1 - u * side, height - 1 - v * side]) < 2
    if covered is not None:
        rim &= ~covered
    basis, colours = plane[rim], pixels[rim]
    near = np.linalg.norm(colours - np.median(colours, axis=0), axis=-1)
    keep = near <= np.quantile(near, 0.8)
    weights, *_ = np.linalg.lstsq(basis[keep], colours[keep], rcond=None)
    return np.asarray(plane @ weights)


def _outline(mask: NDArray[np.bool_]) -> tuple[str | None, NDArray[np.float64], float]:
    """Best shape for a mask `[H, W]` with its centre (x, y) and radius in pixels."""
    rows, columns = np.nonzero(mask)
    top, bottom = rows.min(), rows.max() + 1
    left, right = columns.min(), columns.max() + 1
    best: tuple[float, str | None, NDArray[np.float64], float] = (
        _MIN_OVERLAP,
        None,
        np.zeros(2),
        0.0,
    )
    for shape in SHAPES:
        u0, u1, v0, v1 = _BOUNDS[shape]
        radius = ((right - left) / (u1 - u0) + (bottom - top) / (v1 - v0)) / 2
        centre = np.array(
            [
                (left + right) / 2 - radius * (u0 + u1) / 2,
                (top + bottom) / 2 - radius * (v0 + v1) / 2,
            ]
        )
        u = (np.arange(mask.shape[1]) + 0.5 - centre[0]) / radius
        v = (np.arange(mask.shape[0]) + 0.5 - centre[1]) / radius
        template = contains(shape, u[None, :], v[:, None])
        overlap = float((template & mask).sum() / (template | mask).sum())
        if overlap > best[0]:
            best = (overlap, shape, centre, float(radius))
    return best[1], best[2], best[3]


def _nearest_colour(rgb: NDArray[np.float64]) -> str:
    return _NAMES[int(np.linalg.norm(_PALETTE - rgb, axis=1).argmin())]


def _nearest_position(centre: NDArray[np.float64]) -> str:
    places = np.asarray(list(POSITIONS.values()))
    return list(POSITIONS)[int(np.linalg.norm(places - centre, axis=1).argmin())]


def _bounds(shape: str) -> tuple[float, float, float, float]:
    """Bounding box (u0, u1, v0, v1) of a shape of radius 1, from a fine raster."""
    axis = np.linspace(-1.2, 1.2, 961)
    rows, columns = np.nonzero(contains(shape, axis[None, :], axis[:, None]))
    return axis[columns.min()], axis[columns.max()], axis[rows.min()], axis[rows.max()]


_BOUNDS = {shape: _bounds(shape) for shape in SHAPES}


def main() -> None:
    """Print the oracle's accuracy on fresh renders at the demo's resolution."""
    from data.make_pictures import square_render

    trials = 2000
    scenes, images = zip(
        *(square_render(seed=99, index=i, side=64) for i in range(trials)), strict=True
    )
    right = sum(agrees(scene, read(image)) for scene, image in zip(scenes, images, strict=True))
    print(f"oracle: {right / trials:.4f} of {trials} renders read exactly as drawn")


if __name__ == "__main__":
    main()
