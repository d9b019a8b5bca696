"""`--overwrite`: a cache of other settings gives way to one of these.

Nothing is deleted but our own manifest, prompts and, as units are done, their records; shards are
left to `prep gc`. Without its manifest the cache says that it is unfinished, and a trainer that is
running reads on, for the shards that the manifest named keep a day (`retire`). Then identity.json
is replaced, which at once makes all units those of former settings: they are encoded again, each
replacing its record. Killed before that, the old cache is there but for its manifest, and after
it `finish` refuses until no former unit is left; the same command goes on in both cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prep.cache.retire import retire
from prep.encode.networks import Encoders
from prep.encoders.vae import VaeEncoder
from shared.cache.identity import differences, generation_of
from shared.cache.manifest import CachePaths
from shared.storage.files import dump_json, guard, parse_json, sync_folder
from shared.storage.update import update


def calibrated_anew(encoders: Encoders, stored: Mapping[str, Any]) -> Encoders:
    """The encoders, without the recorded scale where it is another VAE's or another dtype's."""
    recorded = {name: value for name, value in stored["vae"].items() if name != "source"}
    vae = encoders.vae
    if not differences(recorded, vae.identity()):
        return encoders
    return replace(encoders, vae=VaeEncoder(vae.source, vae.device, vae.batch_size, vae.dtype))


def begin(cache: CachePaths, stored: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Put `identity` in the place of `stored`; False where another part was faster."""
    began = False

    def change(content: bytes | None) -> bytes | None:
        nonlocal began
        there = {} if content is None else parse_json(content, cache.identity)
        began = generation_of(there) == generation_of(stored)
        if not began:
            return None
        with guard(cache.root):
            retire(cache, ())
            cache.manifest.unlink(missing_ok=True)
            # With the same text encoders the prompts that were added are still right.
            if differences(stored["text"], identity["text"]):
                cache.conditioning.unlink(missing_ok=True)
            sync_folder(cache.root)
        return dump_json(identity)

    update(cache.identity, change, cache.tmp)
    return began
