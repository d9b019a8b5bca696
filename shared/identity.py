"""identity.json: what every sample of a cache has in common, claimed by whoever begins it.

Settings never mix. `prep encode --overwrite` replaces them as a whole: `generation` counts how
often that was done (it is missing where it never was), and a unit's record says which generation
made it. So the replacement of this one file makes every former unit stale at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.cache import CachePaths
from shared.errors import UserError
from shared.storage import create_exclusively, dump_json, load_json

OURS = {"format", "family", "model", "vae", "text", "latents", "preprocessing", "shapes"}
ADDED = ("config", "configs", "tokenizers")  # what older caches do not say of their encoders


class OtherSettings(UserError):
    """The cache was begun with settings that differ."""


def claim_identity(cache: CachePaths, identity: Mapping[str, Any], remedy: str) -> None:
    """Create `identity.json`, or check that the one there says the same.

    Model and VAE may lie elsewhere where their weights are the same. Raises OtherSettings that
    names what differs; `remedy` ends the sentence.
    """
    if create_exclusively(dump_json(identity), cache.identity, cache.tmp):
        return
    if differing := other_settings(load_json(cache.identity), identity):
        raise OtherSettings(f"{cache.root} was made with other settings: {differing}; {remedy}")


def read_identity(cache: CachePaths) -> dict[str, Any]:
    """What the cache was begun with; empty where there is none yet.

    Raises UserError for a file of that name that is not ours, which is never to be replaced.
    """
    if not cache.identity.exists():
        return {}
    stored = load_json(cache.identity)
    if not isinstance(stored, dict) or not stored.keys() >= OURS:
        raise UserError(
            f"{cache.identity} is not one that `prep encode` writes; choose another --cache"
        )
    return stored


def generation_of(identity: Mapping[str, Any]) -> int:
    """How often the settings of this cache were replaced."""
    return int(identity.get("generation", 0))


def other_settings(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs, or an empty string; what decides no bytes does not count."""
    return differences(_deciding(stored), _deciding(wanted))


def _deciding(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Without the places where the same weights lie, and without the CPU's threads on a GPU."""
    vae = {name: value for name, value in identity.get("vae", {}).items() if name != "source"}
    shapes = dict(identity.get("shapes", {}))
    if shapes.get("device") != "cpu":
        shapes.pop("threads", None)  # which older caches record all the same
    return {**identity, "model": None, "vae": vae, "shapes": shapes}


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
