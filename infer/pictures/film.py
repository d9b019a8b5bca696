"""Frames become a GIF and an MP4."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SMALL = 256  # pixels; smaller frames are enlarged by a whole factor
EXTRA = "pip install '.[morph]' (imageio and imageio-ffmpeg)"

Pixels = NDArray[np.uint8]


def enlarged(frames: Sequence[Pixels]) -> list[Pixels]:
    """Frames `[H, W, 3]` that can be seen: of SMALL pixels at the least, by a whole factor."""
    zoom = max(1, SMALL // min(frames[0].shape[:2]))
    return [one.repeat(zoom, axis=0).repeat(zoom, axis=1) for one in frames]


def gif_of(frames: Sequence[Pixels], fps: int) -> bytes:
    """A GIF that begins again at its end."""
    first, *rest = [Image.fromarray(one) for one in enlarged(frames)]
    buffer = io.BytesIO()
    duration = round(1000 / fps)
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=duration, loop=0)
    return buffer.getvalue()


def writes_mp4() -> bool:
    """Is the extra `morph` installed?"""
    return all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg"))


def write_mp4(path: Path, frames: Sequence[Pixels], fps: int) -> None:
    """Write an H.264 film that players and browsers show; sides are even in all our models."""
    import imageio.v2  # an extra

    pictures: Any = enlarged(frames)
    imageio.v2.mimwrite(path, pictures, format="FFMPEG", fps=fps, macro_block_size=2, quality=9)
