"""`--overwrite`: a cache of other settings gives way to one of these.

Nothing is deleted but our own manifest, prompts and, as units are done, their records; shards are
left to `prep gc`. Without its manifest the cache says that it is unfinished, and a trainer that is
running reads on, for the shards that the manifest named keep a day (`retire`). Then identity.json
is replaced, which at once makes all units those of former settings: they are encoded again, each
replacing its record. Killed before that, the old cache is there but for its manifest, and after
it `finish` refuses until no former unit is left; the same command goes on in both cases.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from prep.cache.retire import retire
from prep.encode.networks import Encoders
from prep.encoders.vae import VaeEncoder
from shared.cache.identity import Identity, differences
from shared.cache.paths import CachePaths
from shared.storage.files import dump_json, guard, parse_json, sync_folder
from shared.storage.update import update


def calibrated_anew(encoders: Encoders, stored: Identity) -> Encoders:
    """Drop the recorded scale where it is another VAE's or another dtype's."""
    vae, recorded = encoders.vae, replace(stored.vae, source=None)
    if not differences(asdict(recorded), asdict(vae.identity())):
        return encoders
    return replace(encoders, vae=VaeEncoder(vae.source, vae.device, vae.batch_size, vae.dtype))


def replace_identity(cache: CachePaths, stored: Identity, identity: Identity) -> bool:
    """Put `identity` in the place of `stored`; False where another part was faster."""
    replaced = False

    def change(content: bytes | None) -> bytes | None:
        nonlocal replaced
        there = {} if content is None else parse_json(content, cache.identity)
        replaced = there.get("generation", 0) == stored.generation
        if not replaced:
            return None
        with guard(cache.root):
            retire(cache, ())
            cache.manifest.unlink(missing_ok=True)
            # With the same text encoders the prompts that were added are still right.
            if differences(asdict(stored.text), asdict(identity.text)):
                cache.conditioning.unlink(missing_ok=True)
            sync_folder(cache.root)
        return dump_json(identity.to_json())

    update(cache.identity, change, cache.tmp)
    return replaced
