"""The commands of stage one, each told from its flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from prep import config, engine, identity
from prep.sources import Unit, find_units
from prep.text import TextEncoder
from prep.vae import posterior_matters
from shared.cache import CachePaths, claim_identity, open_manifest, read_units
from shared.conditioning import Conditioning, load_conditioning, save_conditioning
from shared.device import pick_device
from shared.errors import UserError
from shared.family import Model, resolve_model
from shared.storage import load_json, sweep

PREVIEWS = 4  # prompts taken from the data where none are named


def encode(config: config.EncodeConfig) -> None:
    """Sources to cache: claim the identity, encode what is pending, fold the manifest."""
    check_flags(config)
    units = find_units(config.shards, config.folder_units)
    model = resolve_model(config.model)
    cache = CachePaths(config.cache)
    stale = stale_units(cache, units, config.prune)
    shapes = identity.choose_shapes(config, cache)
    settings = identity.choose_settings(config, model, keep_logvar(config, cache))
    encoders = identity.load_encoders(model, shapes, config.clip_skip)
    todo = engine.pending(cache, units)
    captions: list[str] = []
    seconds = 0.0
    if todo:
        captions, moments, seconds = engine.probe(todo, settings, encoders)
        if config.latents == "auto" and not cache.identity.exists():
            settings = replace(settings, keep_logvar=posterior_matters(moments))
    layout = identity.expected_layout(encoders, settings)
    work = engine.estimate(todo, layout, seconds, cache.root)
    print(work, file=sys.stderr)
    engine.refuse_full_disk(work, cache.root)
    if config.dry_run:
        return
    sweep(cache.tmp)
    claim_identity(
        cache,
        identity.build_identity(model, encoders, settings, shapes),
        "give the same flags and model, or another --cache",
    )
    for name in stale:
        (cache.units / f"{name}.json").unlink()
    prompts = config.preview_prompts
    if not prompts and not cache.conditioning.exists():
        prompts = tuple(dict.fromkeys(captions))[:PREVIEWS]
    add_prompts(cache, model, encoders.text, prompts)
    engine.run(
        todo, encoders, settings, cache, work.rows, config.decode_workers,
        config.max_reject_fraction,
    )  # fmt: skip
    print(engine.finish(cache))


def check_flags(config: config.EncodeConfig) -> None:
    """Raise UserError for numbers that cannot work."""
    for name in ("vae_batch_size", "text_batch_size", "threads", "decode_workers", "max_captions",
                 "views"):  # fmt: skip
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    for name in ("seed", "min_size", "clip_skip"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} is negative")


def keep_logvar(config: config.EncodeConfig, cache: CachePaths) -> bool:
    """Is the posterior's logvar stored? As flagged, else as the cache was begun."""
    if config.latents not in ("auto", "mean", "posterior"):
        raise UserError(f"--latents {config.latents!r} is not one of auto, mean, posterior")
    if config.latents == "auto" and cache.identity.exists():
        return bool(load_json(cache.identity)["latents"] == "posterior")
    return config.latents == "posterior"


def stale_units(cache: CachePaths, units: Sequence[Unit], prune: bool) -> list[str]:
    """Units of the cache whose source is not listed any more, if they are to be dropped.

    Raises UserError if they are not: silently kept they would be trained on, silently dropped
    they would have to be encoded again.
    """
    names, sources = {unit.name for unit in units}, {unit.source for unit in units}
    stale = [record for record in read_units(cache) if record.name not in names]
    # A folder that grew or shrank has other units now; the former ones are simply replaced.
    unlisted = [record for record in stale if record.source not in sources]
    if unlisted and not prune:
        raise UserError(
            f"{cache.root} also holds {len(unlisted)} units that --shards does not list "
            f"(first: {unlisted[0].source}); list them too, or drop them with --prune"
        )
    return [record.name for record in stale]


def add_prompts(
    cache: CachePaths, model: Model, encoder: TextEncoder, prompts: Sequence[str]
) -> int:
    """Put prompts that are not there yet into conditioning.safetensors; returns how many."""
    if cache.conditioning.exists():
        stored = load_conditioning(cache.conditioning)
    else:
        empty = identity.unconditional(model, encoder)
        stored = Conditioning(empty, (), empty[0:0])
    fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in stored.prompts]
    if fresh:
        stored = stored.with_prompts(fresh, encoder.encode(fresh))
    if fresh or not cache.conditioning.exists():
        save_conditioning(stored, cache.conditioning, cache.tmp)
    return len(fresh)


def embed(config: config.EmbedConfig) -> None:
    """Add prompts to a cache, with the text encoders it was made with."""
    cache = CachePaths(config.cache)
    stored = open_manifest(config.cache).identity
    model = resolve_model(config.model or stored["model"])
    encoder = TextEncoder(
        model, pick_device(config.device), stored["shapes"]["text_batch_size"],
        stored["text"].get("clip_skip", 0),
    )  # fmt: skip
    if encoder.identity()["fingerprints"] != stored["text"]["fingerprints"]:
        raise UserError(
            f"{config.cache} was made with other text encoders than {model.source}'s; "
            "pass --model with the one it was made with"
        )
    added = add_prompts(cache, model, encoder, config.prompts)
    print(f"{added} prompts added, {len(set(config.prompts)) - added} were there already")


def finish(config: config.FinishConfig) -> None:
    """Fold the committed units into the manifest."""
    print(engine.finish(CachePaths(config.cache)))
