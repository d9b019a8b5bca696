"""identity.json: what every sample of a cache has in common, claimed by whoever begins it.

Settings never mix. `prep encode --overwrite` replaces them as a whole: `generation` counts how
often that was done (it is missing where it never was), and a unit's record says which generation
made it. So the replacement of this one file makes every former unit stale at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from shared.cache.manifest import Manifest
from shared.cache.paths import CachePaths, refuse_format
from shared.errors import UserError
from shared.storage.files import create_exclusively, dump_json, load_record, parse_record
from shared.storage.reading import read_if_there
from shared.storage.typed_json import record_of

ADDED = ("config", "configs", "tokenizers")  # what older caches do not say of their encoders


@dataclass(frozen=True)
class _Vae:
    fingerprint: str
    channels: int
    downscale: int
    scaling_factor: float
    dtype: str
    rescale: float | None = None
    source: str | None = None
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Text:
    fingerprints: tuple[str, ...]
    length: int
    width: int
    force_zeros: bool
    pooled_width: int | None = None
    clip_skip: int = 0
    configs: Mapping[str, Any] | None = None
    tokenizers: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Preprocessing:
    resolution: int
    views: int
    max_captions: int
    center_crop: bool
    random_crop: bool = False
    random_flip: bool = False
    seed: int = 0
    min_size: int = 0
    buckets: Mapping[str, int | bool] | None = None


@dataclass(frozen=True)
class _Shapes:
    vae_batch_size: int
    text_batch_size: int
    device: str
    threads: int | None = None  # of the CPU; on a GPU they decide nothing


@dataclass(frozen=True)
class _Identity:
    """What every identity says, and of what type it is; there may be more."""

    format: int
    family: str
    model: str
    latents: str
    vae: _Vae
    text: _Text
    preprocessing: _Preprocessing
    shapes: _Shapes
    generation: int = 0


OURS = {field.name for field in fields(_Identity)} - {"generation"}


class OtherSettings(UserError):
    """The cache was begun with settings that differ."""


def claim_identity(cache: CachePaths, identity: Mapping[str, Any], remedy: str) -> None:
    """Create `identity.json`, or check that the one there says the same.

    Model and VAE may lie elsewhere where their weights are the same. Raises OtherSettings that
    names what differs; `remedy` ends the sentence.
    """
    if create_exclusively(dump_json(identity), cache.identity, cache.tmp):
        return
    stored = load_record(cache.identity, dict, "restore it, or choose another --cache")
    if differing := other_settings(stored, identity):
        raise OtherSettings(f"{cache.root} was made with other settings: {differing}; {remedy}")


def read_identity(cache: CachePaths) -> dict[str, Any]:
    """What the cache was begun with; empty where there is none yet.

    Raises UserError for a file of that name that is damaged, of another format, or not ours: none
    of these is ever to be replaced.
    """
    content = read_if_there(cache.identity)
    if content is None:
        return {}

    def build(stored: Mapping[str, Any]) -> dict[str, Any]:
        if not stored.keys() >= OURS:
            raise UserError(
                f"{cache.identity} is not one that `prep encode` writes; choose another --cache"
            )
        refuse_format(stored, cache.root)
        check_identity(stored)
        return dict(stored)

    return parse_record(content, cache.identity, build, "restore it, or choose another --cache")


def whole_identity(cache: CachePaths, manifest: Manifest) -> Mapping[str, Any]:
    """The manifest's identity. Raises UserError where it is not one that `prep encode` writes."""
    try:
        check_identity(manifest.identity)
    except ValueError as error:
        raise UserError(
            f"{cache.manifest} is damaged (its identity: {error}); run `prep finish`"
        ) from None
    return manifest.identity


def check_identity(stored: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what is wrong, for what is not the identity of a cache."""
    found = record_of(_Identity, stored, ignore_unknown=True)
    made, vae, shapes = found.preprocessing, found.vae, found.shapes
    numbers = (vae.channels, vae.downscale, made.resolution, made.views, made.max_captions,
               found.text.length, found.text.width, shapes.vae_batch_size, shapes.text_batch_size,
               1 if shapes.threads is None else shapes.threads)  # fmt: skip
    if min(numbers) < 1 or vae.scaling_factor <= 0 or found.generation < 0:
        raise ValueError("a number in it is zero or below")
    if found.latents not in ("mean", "posterior"):
        raise ValueError(f"latents is {found.latents!r:.60}, neither mean nor posterior")


def generation_of(identity: Mapping[str, Any]) -> int:
    """How often the settings of this cache were replaced."""
    return int(identity.get("generation", 0))


def other_settings(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs, or an empty string; what decides no bytes does not count."""
    return differences(_deciding(stored), _deciding(wanted))


def _deciding(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Without the places where the same weights lie, and without the CPU's threads on a GPU."""
    found = {**identity, "model": None}
    if isinstance(vae := identity.get("vae"), Mapping):
        found["vae"] = {name: value for name, value in vae.items() if name != "source"}
    shapes = identity.get("shapes")
    if isinstance(shapes, Mapping) and shapes.get("device") != "cpu":
        # Older caches record them all the same.
        found["shapes"] = {name: value for name, value in shapes.items() if name != "threads"}
    return found


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    """`latents.size: stored 64, wanted 32` for everything that differs, or an empty string."""
    found = []
    for name in sorted(stored.keys() | wanted.keys()):
        if name in ADDED and not (name in stored and name in wanted):
            continue  # one of them is too old to say
        old, new = stored.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if nested := differences(old, new, f"{prefix}{name}."):
                found.append(nested)
        elif old != new:
            found.append(f"{prefix}{name} is {_short(old)} there, {_short(new)} here")
    return "; ".join(found)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:16] + "..."
