"""Prompts whose embeddings a cache keeps, to draw previews and samples with."""

from __future__ import annotations

from collections.abc import Sequence

from prep import config
from prep.encode.identity import same_encoder
from prep.encoders.text import TextEncoder
from shared.cache.conditioning import Conditioning, dump_conditioning, parse_conditioning
from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.errors import UserError
from shared.machine.device import pick_device, set_threads
from shared.models.family import recorded_model, resolve_model
from shared.storage.temporary import sweep
from shared.storage.update import update
from shared.wording import counted

PREVIEWS = 4  # taken from the data where none are named


def add_prompts(
    cache: CachePaths, encoder: TextEncoder, prompts: Sequence[str], captions: Sequence[str] = ()
) -> int:
    """Put prompts that are not there yet into conditioning.safetensors; returns how many.

    Where there is no such file yet and no prompt is asked for, the first captions are taken.
    """
    added = 0

    def change(content: bytes | None) -> bytes | None:
        nonlocal added
        wanted = dict.fromkeys(prompts)
        if content is None:
            empty = encoder.unconditional()
            stored = Conditioning(empty, (), empty[0:0])
            wanted = wanted or dict.fromkeys(list(dict.fromkeys(captions))[:PREVIEWS])
        else:
            stored = parse_conditioning(content, cache.conditioning)
        fresh = [prompt for prompt in wanted if prompt not in stored.prompts]
        added = len(fresh)
        if fresh:
            stored = stored.with_prompts(fresh, encoder.encode(fresh))
        return dump_conditioning(stored) if fresh or content is None else None

    update(cache.conditioning, change, cache.tmp)
    return added


def embed(config: config.EmbedConfig) -> None:
    """Add prompts to a cache, with the text encoders it was made with."""
    cache = CachePaths(config.cache)
    stored = open_manifest(config.cache).identity
    sweep(cache.tmp)
    model = resolve_model(config.model or recorded_model(stored.model))
    set_threads(stored.shapes.threads)
    device, batch_size = pick_device(config.device), stored.shapes.text_batch_size
    encoder = TextEncoder(model, device, batch_size, stored.text.clip_skip)
    if not same_encoder(stored.text, encoder.identity()):
        raise UserError(
            f"{config.cache} was made with other text encoders than {model.source}'s; "
            "pass --model with the one it was made with"
        )
    added = add_prompts(cache, encoder, config.prompts)
    there = len(set(config.prompts)) - added
    more = f", {there} {'was' if there == 1 else 'were'} there already" if there else ""
    print(f"{counted(added, 'prompt')} added{more}")
