"""Reads style and content of a picture of the shapes world, each for itself, by plain analysis.

    python -m train evaluate --scorer data.style_oracle:score_style ...    # is it studded?
    python -m train evaluate --scorer data.style_oracle:score_content ...  # is the caption right?
    python -m train evaluate --scorer data.style_oracle:score ...          # are both?

There is a stud where its place stands out from what is around it. For the content, studs are
painted over with the field, and the rest is read as the plain oracle reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.oracle import agrees, field, read
from data.shapes import STUD_RADIUS, STUDS, Scene, parse

CONTRAST = 25.0  # of a stud to its surroundings, in RGB; red and orange lie 105 apart
ALIKE = 90.0  # as far may a picture's studs lie from their mean colour
UNEVEN = 40.0  # may lie the half of a stud's pixels from its colour
CORE = 0.7  # of a stud's radius; what is outside is blurred
SURROUNDINGS = (1.4, 1.9)  # of its radius


def score_style(images: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float64]:
    """1.0 where a picture is studded, whatever else it shows, else 0.0.

    images: RGB `[N, H, W, 3]` uint8, square.
    """
    assert len(images) == len(captions)
    return np.asarray([float(is_studded(image)) for image in images])


def score_content(images: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float64]:
    """1.0 where a picture shows all that its caption names, studded or not, else 0.0."""
    pairs = zip(images, captions, strict=True)
    return np.asarray([float(agrees(parse(text), read_content(image))) for image, text in pairs])


def score(images: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float64]:
    """1.0 where a picture is studded and shows all that its caption names, else 0.0."""
    return score_style(images, captions) * score_content(images, captions)


def is_studded(image: NDArray[np.uint8]) -> bool:
    """Is there a stud in both corners, and are they of one colour?"""
    pixels = image.astype(np.float64)
    colours = [stud_colour(pixels, stud) for stud in STUDS]
    found = np.asarray([colour for colour in colours if colour is not None])
    return len(found) == len(STUDS) and bool(
        np.all(np.linalg.norm(found - found.mean(0), axis=1) < ALIKE)
    )


def read_content(image: NDArray[np.uint8]) -> Scene | None:
    """What `read` sees where there are no studs."""
    pixels = image.astype(np.float64)
    covered = np.zeros(image.shape[:2], dtype=bool)
    for stud in STUDS:
        if stud_colour(pixels, stud) is not None:
            covered |= distance_from(stud, image.shape[0]) < SURROUNDINGS[0] * STUD_RADIUS
    if not covered.any():
        return read(image)
    ground = np.clip(np.rint(field(pixels, covered)), 0, 255).astype(np.uint8)
    return read(np.where(covered[..., None], ground, image))


def stud_colour(
    pixels: NDArray[np.float64], stud: tuple[float, float]
) -> NDArray[np.float64] | None:
    """The colour where a stud belongs, or None where nothing stands out there."""
    distance = distance_from(stud, pixels.shape[0])
    near, far = (share * STUD_RADIUS for share in SURROUNDINGS)
    inner = pixels[distance < CORE * STUD_RADIUS]
    core = np.median(inner, axis=0)
    if np.median(np.linalg.norm(inner - core, axis=1)) > UNEVEN:
        return None
    around = np.median(pixels[(distance > near) & (distance < far)], axis=0)
    return core if np.linalg.norm(core - around) > CONTRAST else None


def distance_from(stud: tuple[float, float], side: int) -> NDArray[np.float64]:
    """From a point (x, y) to the pixels `[side, side]`, in sides of the picture."""
    axis = (np.arange(side) + 0.5) / side
    return np.asarray(np.hypot(axis[None, :] - stud[0], axis[:, None] - stud[1]))
