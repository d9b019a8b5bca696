"""Samples encoded once more from their source: are the latents those of the pictures?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from prep.cache.reuse import NOTHING
from prep.config import VerifyConfig
from prep.encode import latents
from prep.encode.captions import CaptionMemo, embed_chunk
from prep.encode.decode_rows import decode_row
from prep.encode.identity import same_encoder
from prep.encode.networks import Encoders, VaeChoice, load_encoders
from prep.encode.samples import Decoded, Encoded
from prep.encode.settings import Settings
from prep.inspect.find_originals import Originals
from prep.inspect.originals import Stored, draw, rows_of, settings_of, vae_source
from shared.cache.identity import Identity
from shared.cache.manifest import Manifest
from shared.cache.paths import CachePaths
from shared.cli.progress import Progress
from shared.errors import UserError
from shared.machine.device import pick_device
from shared.models.family import recorded_model, resolve_model
from shared.wording import counted

# Largest relative error (RMS) that another machine may cause, by the encoder's recorded dtype.
TOLERANCE = {"float32": 0.005, "float16": 0.02, "bfloat16": 0.1}


def disagreements(
    config: VerifyConfig, manifest: Manifest, progress: Progress
) -> Iterator[tuple[str, str]]:
    """Yield unit and a line for each of `config.reencode` samples that does not come out again.

    Samples whose source is gone or has changed are counted and said, which is no damage. Raises
    UserError where the model is another one than the cache was made with.
    """
    cache = CachePaths(config.cache)
    identity = manifest.identity
    encoders = encoders_of(config, identity)
    settings = settings_of(identity)
    stored = draw(cache, manifest.shards, config.reencode, config.seed)
    originals = Originals(config.shards)
    rows = rows_of(cache, stored, originals)
    found = [(old, rows[old.key]) for old in stored if old.key in rows]
    decoded = [(old, decode_row(row, settings)) for old, row in found]
    fresh = [(old, new) for old, new in decoded if not new.reason]
    worst: dict[str, float] = {}
    for start in range(0, len(fresh), encoders.vae.batch_size):
        batch = fresh[start : start + encoders.vae.batch_size]
        again = encode_batch([new for _, new in batch], encoders, settings)
        for (old, _), new in zip(batch, again, strict=True):
            for name, error in errors(old, new, encoders.vae.channels).items():
                worst[name] = max(worst.get(name, 0.0), error)
                allowed = tolerance(identity, name)
                if not error <= allowed:
                    assert old.unit is not None
                    yield (
                        old.unit.name,
                        f"{old.shard.file} sample {old.index} ({old.key}): {name} differ by "
                        f"{error:.2%} from those encoded now (up to {allowed:.1%} is rounding)",
                    )
    largest = ", ".join(f"{name} {error:.1e}" for name, error in worst.items()) or "none"
    progress.write(
        f"encoded again: {counted(len(fresh), 'sample')}; largest relative difference: {largest}"
    )
    if unasked := originals.unasked_note():
        progress.write(f"not compared: {unasked}")
    if missing := len(stored) - len(fresh) - originals.unasked.total():
        progress.write(
            f"not compared: {counted(missing, 'sample')} whose source is gone or has changed"
        )


def encoders_of(config: VerifyConfig, identity: Identity) -> Encoders:
    """Load the cache's encoders on this machine's device, with the recorded batch shapes."""
    model = resolve_model(config.model or recorded_model(identity.model))
    vae = VaeChoice(vae_source(identity, config), identity.vae.dtype, identity.vae.rescale)
    device, clip_skip = pick_device(config.device), identity.text.clip_skip
    encoders = load_encoders(model, identity.shapes, vae, clip_skip, device)
    parts = {
        "vae": same_encoder(identity.vae, encoders.vae.identity()),
        "text": same_encoder(identity.text, encoders.text.identity()),
    }
    for part, same in parts.items():
        if not same:
            raise UserError(
                f"{config.cache} was made with another {part} encoder than {model.source}'s; "
                "pass --model with the one it was made with"
            )
    return encoders


def encode_batch(batch: list[Decoded], encoders: Encoders, settings: Settings) -> list[Encoded]:
    """Encode decoded samples of any sizes as `prep encode` does, in their order."""
    memo, by_size = CaptionMemo(encoders.text, NOTHING), defaultdict(list)
    for index, sample in enumerate(embed_chunk(batch, memo, settings.max_captions)):
        by_size[sample.decoded.pictures[0].pixels.shape].append((index, sample))
    encoded: dict[int, Encoded] = {}
    for numbered in by_size.values():
        indices, samples = zip(*numbered, strict=True)
        running = latents.start(list(samples), encoders.vae)
        done = latents.finish(running, encoders.vae, settings.keep_logvar)
        encoded |= zip(indices, done, strict=True)
    return [encoded[index] for index in range(len(batch))]


def errors(old: Stored, new: Encoded, channels: int) -> dict[str, float]:
    """Relative RMS error of each array, the posterior's mean and logvar apart."""
    found, fresh = {}, new.arrays
    for name, stored in old.arrays.items():
        if name == "latents":
            found["latents"] = relative(stored[:, :channels], fresh[name][:, :channels])
            if stored.shape[1] > channels:
                found["logvar"] = relative(stored[:, channels:], fresh[name][:, channels:])
        else:
            found[name] = relative(stored, fresh[name])
    return found


def relative(stored: NDArray[np.generic], fresh: NDArray[np.generic]) -> float:
    """RMS of the difference, in parts of the RMS of what is stored."""
    if stored.shape != fresh.shape:
        return float("inf")
    a, b = stored.astype(np.float64), fresh.astype(np.float64)
    return float(np.sqrt(((a - b) ** 2).mean() / max((a**2).mean(), 1e-12)))


def tolerance(identity: Identity, name: str) -> float:
    """How far an array may be off, by the dtype its encoder ran in; time_ids not at all."""
    if name == "time_ids":
        return 0.0
    dtype = (identity.vae if name in ("latents", "logvar") else identity.text).dtype
    return TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
