"""From samples of a cache back to the rows they were made from."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from prep.cache.accounts import accounts
from prep.cache.random_samples import draw_indices
from prep.config import OriginalsFlags
from prep.encode.caption_shuffle import Shuffle
from prep.encode.decode_rows import decode_row
from prep.encode.settings import Settings
from prep.encode.writer import sample_key
from prep.images.crop import Framing
from prep.inspect.find_originals import Originals
from prep.rows.row import Row
from shared.cache.identity import Identity
from shared.cache.manifest import read_unit
from shared.cache.paths import CachePaths
from shared.cache.units import Shard, UnitRecord
from shared.errors import UserError
from shared.machine.device import pick_device, set_threads
from shared.models.family import recorded_model, resolve_model
from shared.models.rescale import vae_fingerprint
from shared.models.vae import decode_latents, load_vae


@dataclass(frozen=True)
class Stored:
    """A sample as it lies in the cache."""

    shard: Shard
    index: int  # within the shard
    key: str
    record: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]
    unit: UnitRecord | None  # None where its record is gone


@dataclass(frozen=True)
class Pair:
    """What went in and what the latents hold: pixels `[H, W, 3]`."""

    key: str
    caption: str
    decoded: NDArray[np.uint8]
    original: NDArray[np.uint8] | None  # None where the source is gone or has changed

    @property
    def psnr(self) -> float | None:
        """PSNR of the two in dB, or None without an original."""
        return None if self.original is None else psnr(self.original, self.decoded)


def settings_of(identity: Identity) -> Settings:
    """Read the settings that a cache was encoded with."""
    made = identity.preprocessing
    return Settings(
        framing=Framing.of(made),
        keep_logvar=identity.posterior,
        max_captions=made.max_captions,
        clip_skip=identity.text.clip_skip,
        shuffle=None if made.shuffle is None else Shuffle(**made.shuffle),
    )


def vae_of(identity: Identity, flags: OriginalsFlags) -> AutoencoderKL:
    """Load the VAE a cache was made with, from where the flags say or the identity does.

    Raises UserError where it cannot be loaded or is another one.
    """
    source = vae_source(identity, flags)
    set_threads(None)
    vae = load_vae(source).to(pick_device(flags.device))
    if vae_fingerprint(vae) != identity.vae.fingerprint:
        raise UserError(
            f"the cache was made with another VAE than {source}'s; "
            "pass --model or --vae with the one it was made with"
        )
    return vae


def vae_source(identity: Identity, flags: OriginalsFlags) -> str:
    """Where the VAE of a cache is: as flagged, else as recorded, else with the model."""
    recorded = None if flags.model else identity.vae.source
    if flags.vae or recorded:
        return flags.vae or recorded_model(recorded or "", "--vae")
    return resolve_model(flags.model or recorded_model(identity.model)).source


def draw(cache: CachePaths, shards: Sequence[Shard], count: int, seed: int) -> list[Stored]:
    """`count` samples drawn at random, in the order of the cache; all, where it has fewer.

    Raises UserError where a shard is missing or the bytes drawn are not a sample.
    """
    try:
        return [read_sample(cache, shard, i) for shard, i in draw_indices(shards, count, seed)]
    except (OSError, ValueError) as error:
        raise UserError(f"{cache.root} is damaged ({error}); `prep verify` lists where") from None


def read_sample(cache: CachePaths, shard: Shard, index: int) -> Stored:
    """Sample `index` of a shard. Raises ValueError where the bytes there are none."""
    layout = shard.layout
    key, record, arrays = layout.read(cache.root / shard.file, index)
    # A shard is named after its unit: NAME-HxW-SHA12.tar.
    unit = read_unit(cache, Path(shard.file).name.rsplit("-", 2)[0])
    return Stored(shard, index, key, record, arrays, unit)


def pairs(
    cache: CachePaths, identity: Identity, vae: AutoencoderKL, stored: Sequence[Stored],
    originals: Originals, seconds: float = float("inf"),
) -> Iterator[Pair]:  # fmt: skip
    """Each sample's decoded latents beside its picture; ends early when `seconds` have passed."""
    deadline = time.monotonic() + seconds
    settings, rows = settings_of(identity), dict[str, Row]()
    if identity.drawn is None:  # else there are no pictures behind the samples
        rows = rows_of(cache, stored, originals, deadline)
    for number, sample in enumerate(stored):
        if number and time.monotonic() > deadline:
            return
        mean = sample.arrays["latents"][:1, : identity.vae.channels].astype(np.float32)
        decoded = decode_latents(vae, torch.from_numpy(mean))[0]
        original = None
        if sample.key in rows:
            views = decode_row(rows[sample.key], settings).pictures  # none of a rejected row
            original = views[0].pixels if views and views[0].pixels.shape == decoded.shape else None
        captions = sample.record.get("captions") or [""]
        yield Pair(sample.key, captions[0], decoded, original)


def rows_of(
    cache: CachePaths, stored: Sequence[Stored], originals: Originals,
    deadline: float = float("inf"),
) -> dict[str, Row]:  # fmt: skip
    """Find the source row of each sample by key, but for those gone, changed or not asked for.

    Each source is read once, as far as needed, and until `deadline` (`time.monotonic`).
    """
    by_unit: dict[str, list[Stored]] = {}
    for sample in stored:
        if sample.unit is not None:
            by_unit.setdefault(sample.unit.name, []).append(sample)
    found: dict[str, Row] = {}
    for group in by_unit.values():
        unit = group[0].unit
        assert unit is not None
        keys = {sample.key for sample in group}
        hashes = {row["key"]: row["image_sha256"] for row in accounts(cache, unit, keys)}
        hashes |= {s.key: s.record["sha256"] for s in group if "sha256" in s.record}
        found |= _search(unit, hashes, originals, deadline)
    return found


def _search(
    unit: UnitRecord, hashes: Mapping[str, str], originals: Originals, deadline: float
) -> dict[str, Row]:
    found: dict[str, Row] = {}
    candidates = originals.of(unit, len(hashes))
    with contextlib.suppress(UserError, OSError):  # a source that cannot be read any more
        for candidate in candidates:
            for row in candidate.rows():
                if len(found) == len(hashes) or time.monotonic() > deadline:
                    return found
                key = sample_key(unit.source, row)
                if key in hashes and hashlib.sha256(row.image or b"").hexdigest() == hashes[key]:
                    found[key] = row
    return found


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
