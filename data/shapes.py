"""A small world of captioned pictures: one coloured shape on a coloured field.

A scene is what a caption can name; everything a caption does not name (tint, shading, the exact
place) is drawn at random. The same words serve the renderer, the captions and the oracle, so that
"does the picture show what the prompt says" has an exact answer.

A scene can be drawn in a style, of which no caption tells: "plain", or "studded", which has a dot
of the figure's colour, a stud, in two corners.

All lengths are fractions of the side of the central square, which is what survives a centre crop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 224, 60),
    "green": (42, 157, 74),
    "blue": (38, 84, 214),
    "purple": (136, 56, 176),
    "white": (240, 240, 240),
    "black": (26, 26, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Radius of the circumscribed circle. The gap between the two ranges keeps the words unambiguous.
SIZES: dict[str, tuple[float, float]] = {"small": (0.18, 0.21), "large": (0.27, 0.30)}
POSITIONS: dict[str, tuple[float, float]] = {  # centre of the shape, as (x, y)
    "left": (0.32, 0.50),
    "right": (0.68, 0.50),
    "top": (0.50, 0.32),
    "bottom": (0.50, 0.68),
    "middle": (0.50, 0.50),
}
_PLACE_WORDS = {
    "left": "on the left of",
    "right": "on the right of",
    "top": "at the top of",
    "bottom": "at the bottom of",
    "middle": "in the middle of",
}
JITTER = 0.03  # of the centre, each way
SUBPIXELS = 4  # per side of a pixel, for antialiasing
STYLES = ("plain", "studded")
STUDS = ((0.13, 0.13), (0.87, 0.87))  # centres, as (x, y): no figure comes so near to a corner
STUD_RADIUS = 0.09


@dataclass(frozen=True)
class Scene:
    """What a caption says. `size` and `position` are None where the caption is silent."""

    shape: str
    colour: str
    background: str
    size: str | None = None
    position: str | None = None


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene; size is named in half of them, position in six of ten."""
    colour, background = rng.choice(list(COLOURS), size=2, replace=False)
    return Scene(
        shape=str(rng.choice(SHAPES)),
        colour=str(colour),
        background=str(background),
        size=str(rng.choice(list(SIZES))) if rng.random() < 0.5 else None,
        position=str(rng.choice(list(POSITIONS))) if rng.random() < 0.6 else None,
    )


def caption(scene: Scene) -> str:
    """`a small red circle on the left of a blue field`."""
    size = f"{scene.size} " if scene.size else ""
    place = _PLACE_WORDS[scene.position] if scene.position else "on"
    return (
        f"{_article(size + scene.colour)} {scene.shape} {place} {_article(scene.background)} field"
    )


def parse(text: str) -> Scene:
    """The scene that `caption` wrote as `text`. Raises ValueError for any other sentence."""
    words = re.findall(r"[a-z]+", text.lower())
    colours = [word for word in words if word in COLOURS]
    shapes = [word for word in words if word in SHAPES]
    if len(colours) != 2 or len(shapes) != 1:
        raise ValueError(f"not a caption of the shapes world: {text!r}")
    size = next((word for word in words if word in SIZES), None)
    position = next((word for word in words if word in POSITIONS), None)
    return Scene(shapes[0], colours[0], colours[1], size, position)


def render(
    scene: Scene, rng: np.random.Generator, width: int, height: int, style: str = "plain"
) -> NDArray[np.uint8]:
    """Draw `scene` as RGB `[height, width, 3]`; `rng` decides what the caption leaves open.

    In every style the same `rng` decides the same. Raises ValueError for an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; there are {', '.join(STYLES)}")
    size = scene.size or str(rng.choice(list(SIZES)))
    position = scene.position or str(rng.choice(list(POSITIONS)))
    radius = rng.uniform(*SIZES[size])
    centre = np.asarray(POSITIONS[position]) + rng.uniform(-JITTER, JITTER, 2)
    side = min(width, height)
    x = ((np.arange(width * SUBPIXELS) + 0.5) / SUBPIXELS - width / 2) / side + 0.5
    y = ((np.arange(height * SUBPIXELS) + 0.5) / SUBPIXELS - height / 2) / side + 0.5
    inside = contains(
        scene.shape, (x[None, :] - centre[0]) / radius, (y[:, None] - centre[1]) / radius
    )
    if style == "studded":
        inside |= studs(x[None, :], y[:, None])
    coverage = inside.reshape(height, SUBPIXELS, width, SUBPIXELS).mean((1, 3))[..., None]
    x, y = x.reshape(-1, SUBPIXELS).mean(1), y.reshape(-1, SUBPIXELS).mean(1)
    figure = _tint(scene.colour, rng) * np.ones((height, width, 1))
    ground = _tint(scene.background, rng) * _shading(x, y, rng)
    picture = coverage * figure + (1 - coverage) * ground
    return np.asarray(np.clip(np.rint(picture), 0, 255), dtype=np.uint8)


def contains(shape: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Is (u, v) inside `shape` of circumscribed radius 1 around the origin? v points down."""
    r = np.hypot(u, v)
    if shape == "circle":
        return r < 0.9
    if shape == "ring":
        return (r < 0.95) & (r > 0.52)
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) < 0.75
    if shape == "cross":
        wide, narrow = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
        return (wide < 0.92) & (narrow < 0.3)
    if shape == "triangle":
        return (v < 0.7) & (np.abs(u) < (v + 1.0) * 0.55)
    if shape == "star":  # five points; the edge is a straight line between tip and notch
        angle = np.abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        tip, notch = 1.0, 0.45
        sine = tip * notch * np.sin(np.pi / 5)
        edge = notch * np.sin(np.pi / 5 - angle) + tip * np.sin(angle)
        return np.asarray(r * edge < sine)
    raise ValueError(f"unknown shape {shape!r}")


def studs(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Does (x, y) of the central square lie in a stud?"""
    return np.asarray(np.any([np.hypot(x - u, y - v) < STUD_RADIUS for u, v in STUDS], axis=0))


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _tint(colour: str, rng: np.random.Generator) -> NDArray[np.float64]:
    return np.asarray(COLOURS[colour]) + rng.uniform(-8, 8, 3)


def _shading(
    x: NDArray[np.float64], y: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """A soft light across the field, up to a tenth brighter or darker at the rim."""
    slope_x, slope_y = rng.uniform(-0.2, 0.2, 2)
    light = 1 + slope_x * (x[None, :] - 0.5) + slope_y * (y[:, None] - 0.5)
    return np.asarray(light[..., None])
