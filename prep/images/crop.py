"""A picture to the crops of it that are encoded, with the numbers SDXL wants to know about them.

docs/images.md tells what is done, in order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prep.images.buckets import Buckets, Size
from prep.images.decode import UNDECODABLE, BadImage, opened, shown_size, upright_rgb
from prep.images.strip_metadata import strip_metadata
from shared.cache.identity import Preprocessing

__all__ = ["BadImage", "Framing", "Picture", "prepare"]

# A longer picture is cropped before it is enlarged: a line would fill the memory.
MAX_ASPECT = 16


@dataclass(frozen=True)
class Framing:
    """Which part of a picture is seen, at what size."""

    resolution: int
    crop: str = "center"  # or corner, random
    random_flip: bool = False
    views: int = 1
    seed: int = 0
    min_size: int = 0
    buckets: Buckets | None = None  # None: squares

    def size(self, height: int, width: int) -> Size:
        """Choose what a picture of this size is cropped to. Raises BadImage for a smaller one."""
        if min(height, width) < self.min_size:
            raise BadImage("smaller than --min-size")
        if self.buckets is None:
            return self.resolution, self.resolution
        size = self.buckets.choose(height, width)
        if size is None:
            raise BadImage("smaller than --min-bucket-reso")
        return size

    def to_json(self) -> dict[str, Any]:
        """For the cache's identity, under the names of the flags."""
        return {
            "resolution": self.resolution,
            "center_crop": self.crop == "center",
            "random_crop": self.crop == "random",
            "random_flip": self.random_flip,
            "views": self.views,
            "seed": self.seed,
            "min_size": self.min_size,
            "buckets": None if self.buckets is None else self.buckets.to_json(),
        }

    @staticmethod
    def of(made: Preprocessing) -> Framing:
        """Invert `to_json`."""
        crop = "random" if made.random_crop else "center" if made.center_crop else "corner"
        buckets = None if made.buckets is None else Buckets.from_json(made.resolution, made.buckets)
        return Framing(
            made.resolution, crop, made.random_flip, made.views, made.seed, made.min_size, buckets
        )


@dataclass(frozen=True)
class Picture:
    """A view of a picture: `pixels` `[H, W, 3]` uint8 and its micro-conditioning."""

    pixels: NDArray[np.uint8]
    original_size: Size  # as shown, before any resize
    crop: tuple[int, int]  # (top, left) in the resized picture, after the flip if it is flipped

    @property
    def time_ids(self) -> tuple[int, ...]:
        """original_h, original_w, crop_top, crop_left, target_h, target_w (SDXL, section 2.2)."""
        return (*self.original_size, *self.crop, *self.pixels.shape[:2])


def prepare(data: bytes, framing: Framing) -> tuple[Picture, ...]:
    """Decode, orient, convert to RGB, resize to cover the wanted size, and cut out each view.

    A pure function of the picture's bytes and the framing. What is said about the pixels may be
    broken; that is left out then. Raises BadImage.
    """
    try:
        return _prepared(data, framing)
    except BadImage as error:
        pixels = strip_metadata(data) if str(error) == UNDECODABLE else None
        if pixels is None:
            raise
    return _prepared(pixels, framing)


def _prepared(data: bytes, framing: Framing) -> tuple[Picture, ...]:
    with opened(data) as file:
        original = shown_size(file)
        target = framing.size(*original)
        image = upright_rgb(file, min(_covering(original, target)))
        stretched = max(image.size) > MAX_ASPECT * min(image.size)
        covering = _covering((image.height, image.width), target)
        if not stretched and (image.height, image.width) != covering:
            image = image.resize(covering[::-1], Image.Resampling.LANCZOS)
    drawn = framing.crop == "random" or framing.random_flip
    digest = hashlib.sha256(data).hexdigest() if drawn else ""
    pictures = []
    for view in range(framing.views):
        flip, top, left = _place(framing, covering, target, digest, view)
        # `left` counts in the flipped picture; the part that is mirrored lies on the other side.
        start = covering[1] - target[1] - left if flip else left
        box = (start, top, start + target[1], top + target[0])
        part = _cut_and_enlarge(image, covering, box) if stretched else image.crop(box)
        if flip:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pictures.append(Picture(np.asarray(part, dtype=np.uint8), original, (top, left)))
    return tuple(pictures)


def _covering(size: Size, target: Size) -> Size:
    """Compute the smallest size of the same shape that `target` fits into."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))


def _cut_and_enlarge(
    image: Image.Image, covering: Size, box: tuple[int, int, int, int]
) -> Image.Image:
    """`box` of the picture as if it had been resized to `covering`."""
    scale = max(covering[0] / image.height, covering[1] / image.width)
    left, top, right, bottom = (
        min(edge / scale, side) for edge, side in zip(box, 2 * image.size, strict=True)
    )
    size = (box[2] - box[0], box[3] - box[1])
    return image.resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom))


def _place(
    framing: Framing, covering: Size, target: Size, digest: str, view: int
) -> tuple[bool, int, int]:
    """Flip, top and left of a view, drawn from the picture's content alone.

    Of a picture's views every other one is flipped, beginning with a drawn one.
    """
    room = covering[0] - target[0], covering[1] - target[1]
    flip = framing.random_flip and bool((_draws(framing, digest, "flip")[0] + view) % 2)
    if framing.crop == "random":
        draws = _draws(framing, digest, f"crop {view}")
        return flip, draws[0] % (room[0] + 1), draws[1] % (room[1] + 1)
    if framing.crop == "center":
        return flip, room[0] // 2, room[1] // 2
    return flip, 0, 0


def _draws(framing: Framing, digest: str, purpose: str) -> tuple[int, int]:
    """Two uniform 64-bit numbers; not from NumPy, whose streams change between versions."""
    drawn = hashlib.sha256(f"{framing.seed} {purpose} {digest}".encode()).digest()
    return int.from_bytes(drawn[:8], "big"), int.from_bytes(drawn[8:16], "big")
