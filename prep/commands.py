"""The commands of stage one, each told from its flags."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from prep import config, engine, identity, overwrite, plan, report
from prep.filters import Filters
from prep.folders import repeats_in
from prep.pipeline import Encoders, Settings, Work
from prep.recorded import Originals
from prep.sources import SourceOptions, Unit, find_units
from prep.stale import drop, find_stale, of_generation
from prep.text import TextEncoder
from prep.text_encoding import check_encoding
from prep.vae import posterior_matters
from shared.cache import CachePaths, open_manifest, read_units
from shared.conditioning import Conditioning, load_conditioning, save_conditioning
from shared.device import pick_device
from shared.errors import UserError
from shared.family import Model, recorded_model, resolve_model
from shared.identity import generation_of, other_settings, read_identity
from shared.progress import Progress
from shared.storage import load_json
from shared.temporary import sweep

T = TypeVar("T")

PREVIEWS = 4  # prompts taken from the data where none are named


@dataclass(frozen=True)
class Chosen:
    """With what is encoded."""

    shapes: identity.Shapes
    vae: identity.VaeChoice
    settings: Settings
    encoders: Encoders
    generation: int  # of the settings
    new: bool  # the settings are this command's, not those of a cache that is there


def encode(config: config.EncodeConfig) -> None:
    """Sources to cache: claim the identity, encode what is pending, fold the manifest."""
    check_flags(config)
    units = find_units(config.shards, source_options(config))
    if said := repeats_in(units):
        print(said, file=sys.stderr)
    model = resolve_model(config.model)
    cache = CachePaths(config.cache)
    chosen = choose(config, cache, model)
    settings, encoders = chosen.settings, chosen.encoders
    records = read_units(cache)
    stale = find_stale(cache, records, units, config.prune, chosen.generation)
    known = of_generation(records, chosen.generation)
    todo = plan.pending(cache, share(units, config.part), known)
    captions: list[str] = []
    seconds = None
    if chosen.new or (todo and not cache.conditioning.exists()):
        # All parts of a new cache probe the same pictures and so come to the same settings.
        captions, moments, seconds = plan.probe(units if chosen.new else todo, settings, encoders)
        if config.latents == "auto" and not cache.identity.exists():
            settings = replace(settings, keep_logvar=posterior_matters(moments))
    work = plan.estimate(todo, identity.expected_layout(encoders, settings), seconds, cache)
    print(work, file=sys.stderr)
    plan.refuse_full_disk(work, cache)
    if config.dry_run:
        return
    sweep(cache.tmp)
    begin(cache, model, replace(chosen, settings=settings))
    drop(cache, stale.gone)
    prompts = config.preview_prompts
    if not prompts and not cache.conditioning.exists():
        prompts = tuple(dict.fromkeys(captions))[:PREVIEWS]
    add_prompts(cache, model, encoders.text, prompts)
    job = engine.Job(
        cache, model, chosen.shapes, replace(chosen.vae, rescale=encoders.vae.rescale), settings,
        config.decode_workers, config.max_reject_fraction, tuple(known), chosen.generation,
    )  # fmt: skip
    started = time.monotonic()
    done = encode_units(config, job, todo, encoders, work.rows)
    if stale.replaced:  # last, because what they hold may be copied, also by another part
        known = of_generation(read_units(cache), chosen.generation)
        if not plan.pending(cache, units, known):
            drop(cache, stale.replaced)
    print(f"{done.pictures} pictures and {done.captions} captions encoded, the rest copied")
    if config.part is not None:
        print(f"part {config.part} is done; after the last: prep finish --cache {cache.root}")
        return
    print(engine.finish(cache))
    # Of a cache in which nothing has changed no source is read again, not for its report either.
    changed = bool(todo or stale.gone or stale.replaced)
    if config.report and (changed or not (cache.root / "report.html").exists()):
        seconds, read = time.monotonic() - started, units if changed else ()
        report.write_after_encode(cache, encoders.vae.vae, done.pictures, seconds, read)


def choose(config: config.EncodeConfig, cache: CachePaths, model: Model) -> Chosen:
    """Flags, else what the cache was begun with, else defaults; the encoders are loaded.

    With --overwrite the settings become new where they differ from those of the cache.
    """
    stored = read_identity(cache)
    device = identity.choose_device(config, cache)
    settings = identity.choose_settings(config, model, keep_logvar(config, cache))
    shapes = identity.choose_shapes(config, cache, device, settings.framing.resolution)
    vae = identity.choose_vae(config, cache, model, shapes.device)
    encoders = identity.load_encoders(model, shapes, vae, settings.clip_skip, device)
    generation = generation_of(stored)
    chosen = Chosen(shapes, vae, settings, encoders, generation, new=not stored)
    if not (stored and config.overwrite):
        return chosen
    wanted = identity.build_identity(model, encoders, settings, shapes, generation)
    if not other_settings(stored, wanted):
        return chosen  # replaced already: go on
    encoders = overwrite.calibrated_anew(encoders, stored)
    return replace(chosen, encoders=encoders, generation=generation + 1, new=True)


def begin(cache: CachePaths, model: Model, chosen: Chosen) -> None:
    """Claim the cache for these settings (UserError if it has others), or replace its own."""
    parts = (model, chosen.encoders, chosen.settings, chosen.shapes)
    if chosen.new and chosen.generation:
        overwrite.begin(cache, identity.build_identity(*parts, chosen.generation))
    identity.claim(cache, *parts, begun=not chosen.new, generation=chosen.generation)


def encode_units(
    config: config.EncodeConfig,
    job: engine.Job,
    units: Sequence[Unit],
    encoders: Encoders,
    rows: int,
) -> Work:
    """Run the units on the engine that the flags ask for."""
    with Progress("encode", rows, "img") as progress:
        if config.engine == "ray":
            from prep.engine_ray import encode_with_ray  # an extra that few need

            cpus = config.cpus_per_worker or job.shapes.threads
            outcomes = encode_with_ray(job, units, config.ray_address, cpus, progress)
        else:
            outcomes = engine.encode_here(job, units, encoders, progress)
        return engine.add_up(outcomes, len(units), progress)


def share(items: Sequence[T], part: str | None) -> list[T]:
    """The I-th of N shares of a list. Raises UserError for anything but I/N with I < N."""
    if part is None:
        return list(items)
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--part {part!r} is not I/N, such as 0/4 for the first of four")
    return list(items[int(index) :: int(count)])


def check_flags(config: config.EncodeConfig) -> None:
    """Raise UserError for filters that cannot be understood, and flags that would be ignored."""
    Filters(config.where, config.max_pwatermark)
    if config.caption_encoding is not None:
        check_encoding(config.caption_encoding)
    if config.ray_address is not None and config.engine != "ray":
        raise UserError("--ray-address is for --engine ray; add that, or leave it out")


def source_options(config: config.EncodeConfig) -> SourceOptions:
    """The flags about sources. A `pipe:` may run: `parse` takes one from the command line only."""
    return SourceOptions(
        folder_units=config.folder_units,
        image_column=config.image_column,
        caption_column=config.caption_column,
        caption_encoding=config.caption_encoding,
        key_column=config.key_column,
        streaming=config.streaming,
        dataset_config_name=config.dataset_config_name,
        max_image_bytes=config.max_image_bytes,
        allow_external_images=config.allow_external_images,
        pipes=True,
    )


def keep_logvar(config: config.EncodeConfig, cache: CachePaths) -> bool:
    """Is the posterior's logvar stored? As flagged, else as the cache was begun."""
    if config.latents not in ("auto", "mean", "posterior"):
        raise UserError(f"--latents {config.latents!r} is not one of auto, mean, posterior")
    if config.latents == "auto" and cache.identity.exists():
        return bool(load_json(cache.identity)["latents"] == "posterior")
    return config.latents == "posterior"


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
    sweep(cache.tmp)
    model = resolve_model(config.model or recorded_model(str(stored["model"])))
    encoder = TextEncoder(
        model, pick_device(config.device), stored["shapes"]["text_batch_size"],
        stored["text"].get("clip_skip", 0),
    )  # fmt: skip
    if not identity.same_encoder(stored["text"], encoder.identity()):
        raise UserError(
            f"{config.cache} was made with other text encoders than {model.source}'s; "
            "pass --model with the one it was made with"
        )
    added = add_prompts(cache, model, encoder, config.prompts)
    print(f"{added} prompts added, {len(set(config.prompts)) - added} were there already")


def finish(config: config.FinishConfig) -> None:
    """Fold the committed units into the manifest."""
    cache = CachePaths(config.cache)
    sweep(cache.tmp)
    print(engine.finish(cache))
    if config.report:
        vae = report.load_vae_for(cache, config)
        print(report.write_report(cache, vae, Originals(config.shards)))
