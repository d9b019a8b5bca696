"""The contact sheet: originals beside what their latents decode to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from prep.config import DecodeConfig
from prep.inspect.find_originals import Originals
from prep.inspect.originals import Pair, draw, pairs, vae_of
from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.errors import UserError
from shared.sanitize import visible
from shared.storage.files import guard
from shared.wording import counted

GAP = 4
LABEL = 14
SHORTEST_SIDE = 192  # small pictures are enlarged by whole numbers up to here


def decode(config: DecodeConfig) -> None:
    """Original and decoded latents side by side, with the PSNR between them."""
    cache, manifest = CachePaths(config.cache), open_manifest(config.cache)
    identity = manifest.identity
    vae = vae_of(identity, config)
    stored = draw(cache, manifest.shards, config.count, config.seed)
    originals = Originals(config.shards)
    drawn = identity.drawn is not None
    tiles = [tile(pair, drawn) for pair in pairs(cache, identity, vae, stored, originals)]
    sheet = grid(tiles, columns=max(1, round(len(tiles) ** 0.5 / 1.4)))
    try:
        with guard(config.output.parent):
            config.output.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sheet).save(config.output)
    except ValueError:
        raise UserError(f"--output {config.output}: no such kind of picture; use .png") from None
    shown = counted(len(tiles), "picture")
    what = f"decoded latents, {identity.drawn}" if drawn else "original left, decoded latents right"
    print(f"{config.output}: {shown}, {what}")
    if unasked := originals.unasked_note():
        print(f"without originals: {unasked}")


def tile(pair: Pair, drawn: bool = False) -> NDArray[np.uint8]:
    """Draw the pair, or alone what the teacher has drawn, with a line of text below it."""
    zoom = max(1, SHORTEST_SIDE // min(pair.decoded.shape[:2]))
    right = pair.decoded.repeat(zoom, 0).repeat(zoom, 1)
    left = np.full_like(right, 128)
    if pair.original is not None:
        left = pair.original.repeat(zoom, 0).repeat(zoom, 1)
    if drawn:
        left = right[:, :0]
    label = "drawn" if drawn else "no original" if pair.psnr is None else f"{pair.psnr:.1f} dB"
    both = np.concatenate([left, np.full((len(left), GAP, 3), 255, np.uint8), right], axis=1)
    strip = Image.new("RGB", (both.shape[1], LABEL), "white")
    text = f"{label}  {visible(pair.caption)}".encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(strip).text((2, 1), text[: both.shape[1] // 6], fill="black")
    return np.concatenate([both, np.asarray(strip)], axis=0)


def grid(tiles: list[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Tiles in rows, white between them and around those smaller than the largest."""
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (height + GAP), columns * (width + GAP), 3), 255, np.uint8)
    for index, picture in enumerate(tiles):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet
