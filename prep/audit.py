"""Looking into a cache: does it hold what it says, and do the latents look like the pictures?"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from prep.config import DecodeConfig, VerifyConfig
from prep.images import Framing, prepare
from prep.sources import find_units
from shared.cache import CachePaths, Shard, UnitRecord, open_manifest, read_units
from shared.device import pick_device
from shared.errors import UserError
from shared.family import resolve_model
from shared.fingerprint import fingerprint
from shared.layout import Layout
from shared.progress import Progress
from shared.storage import file_sha256
from shared.vae import decode_latents, load_vae

GAP = 4
LABEL = 14


def verify(config: VerifyConfig) -> int:
    """Print every damage found; the exit status is 1 if there is any."""
    cache = CachePaths(config.cache)
    manifest = open_manifest(config.cache, check_sizes=False)
    units = read_units(cache)
    damages = 0
    with Progress("verify", manifest.totals["written"], "samples") as progress:
        for unit in units:
            for damage in damages_of_unit(cache, unit, progress):
                damages += 1
                progress.write(f"damaged: {damage}")
    listed = [shard.file for unit in units for shard in unit.shards]
    if listed != [shard.file for shard in manifest.shards]:
        damages += 1
        print("damaged: manifest.json is older than the units; run `prep finish`", file=sys.stderr)
    verdict = f"{damages} damages" if damages else "no damage"
    print(f"{config.cache}: {manifest.totals['written']} samples checked, {verdict}")
    return 1 if damages else 0


def damages_of_unit(cache: CachePaths, unit: UnitRecord, progress: Progress) -> Iterator[str]:
    """A line for each file or sample of the unit that is not what its record says."""
    samples = cache.root / unit.samples
    if not samples.exists() or file_sha256(samples) != unit.samples_sha256:
        yield f"{unit.samples} is missing or changed"
    for shard in unit.shards:
        path = cache.root / shard.file
        if not path.exists():
            yield f"{shard.file} is missing"
            continue
        if file_sha256(path) != shard.sha256:
            yield f"{shard.file} is not the file that was committed (sha256 differs)"
        yield from damages_of_shard(path, shard)
        progress.update(shard.count)


def damages_of_shard(path: Path, shard: Shard) -> Iterator[str]:
    """A line for each sample whose bytes, checksum or values are wrong."""
    layout = Layout.from_json(shard.layout)
    for index, sample in enumerate(read_samples(path, layout, shard.count)):
        try:
            key, record, arrays = layout.unpack(sample)
        except ValueError as error:
            yield f"{shard.file} sample {index}: {error}"
            continue
        crc = 0
        for array in arrays.values():
            crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
        if crc != record.get("crc32"):
            yield f"{shard.file} sample {index} ({key}): checksum differs"
        if not all(np.isfinite(array).all() for array in arrays.values()):
            yield f"{shard.file} sample {index} ({key}): non-finite values"


def read_samples(path: Path, layout: Layout, count: int) -> Iterator[bytes]:
    """Each sample's bytes."""
    with path.open("rb") as file:
        for _ in range(count):
            yield file.read(layout.stride)


def decode(config: DecodeConfig) -> None:
    """The first view of originals and decoded latents side by side, with the PSNR between them."""
    manifest = open_manifest(config.cache)
    identity = manifest.identity
    model = resolve_model(config.model or identity["model"])
    vae = load_vae(model.source).to(pick_device(config.device))
    if fingerprint(vae) != identity["vae"]["fingerprint"]:
        raise UserError(
            f"{config.cache} was made with another VAE than {model.source}'s; pass --model"
        )
    if config.count < 1:
        raise UserError("--count must be at least 1")
    rng = np.random.default_rng(config.seed)
    total = manifest.totals["written"]
    framing = Framing.from_json(identity["preprocessing"])
    zoom = max(1, 192 // framing.resolution)
    tiles = []
    for number in sorted(rng.choice(total, min(config.count, total), replace=False)):
        record, latents = load_sample(config.cache, manifest.shards, int(number))
        raw = torch.from_numpy(latents[:1, : identity["vae"]["channels"]].astype(np.float32))
        decoded = decode_latents(vae, raw)[0]
        original = find_original(record, framing)
        tiles.append(tile(original, decoded, record["captions"][0], zoom))
    sheet = grid(tiles, columns=max(1, round(len(tiles) ** 0.5 / 1.4)))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(config.output)
    print(f"{config.output}: {len(tiles)} pictures, original left, decoded latents right")


def load_sample(
    root: Path, shards: tuple[Shard, ...], number: int
) -> tuple[dict[str, Any], NDArray[np.float16]]:
    """Record and latents of the cache's sample `number`."""
    for shard in shards:
        if number < shard.count:
            break
        number -= shard.count
    layout = Layout.from_json(shard.layout)
    with (root / shard.file).open("rb") as file:
        file.seek(number * layout.stride)
        _, record, arrays = layout.unpack(file.read(layout.stride))
    return record, arrays["latents"]


def find_original(record: dict[str, Any], framing: Framing) -> NDArray[np.uint8] | None:
    """The source picture's first view, or None where the source is gone or has changed."""
    with contextlib.suppress(UserError):  # a source that cannot be read any more
        for unit in find_units([record.get("source", "")], None):
            for row in unit.rows():
                data = row.image or b""
                same = hashlib.sha256(data).hexdigest() == record.get("sha256")
                if same and row.key == record.get("source_key"):
                    return prepare(data, framing)[0].pixels
    return None


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def tile(
    original: NDArray[np.uint8] | None, decoded: NDArray[np.uint8], caption: str, zoom: int
) -> NDArray[np.uint8]:
    """The pair, enlarged `zoom` times, with a line of text below it."""
    decoded_big = decoded.repeat(zoom, 0).repeat(zoom, 1)
    left = np.full_like(decoded_big, 128)
    label = "source gone"
    if original is not None:
        left = original.repeat(zoom, 0).repeat(zoom, 1)
        label = f"{psnr(original, decoded):.1f} dB"
    pair = np.concatenate([left, np.full((len(left), GAP, 3), 255, np.uint8), decoded_big], axis=1)
    strip = Image.new("RGB", (pair.shape[1], LABEL), "white")
    text = f"{label}  {caption}".encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(strip).text((2, 1), text[: pair.shape[1] // 6], fill="black")
    return np.concatenate([pair, np.asarray(strip)], axis=0)


def grid(tiles: list[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Tiles in rows, white between them and beside the smaller ones."""
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (height + GAP), columns * (width + GAP), 3), 255, np.uint8)
    for index, picture in enumerate(tiles):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet
