"""The commands of stage one, each told from its flags."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from prep import config, engine, identity, plan, report
from prep.filters import Filters
from prep.pipeline import Encoders, Work
from prep.sources import SourceOptions, Unit, find_units
from prep.text import TextEncoder
from prep.vae import posterior_matters
from shared.cache import CachePaths, UnitRecord, open_manifest, read_units
from shared.conditioning import Conditioning, load_conditioning, save_conditioning
from shared.device import pick_device
from shared.errors import UserError
from shared.family import Model, resolve_model
from shared.progress import Progress
from shared.storage import load_json, sweep, sync_folder

T = TypeVar("T")

PREVIEWS = 4  # prompts taken from the data where none are named


def encode(config: config.EncodeConfig) -> None:
    """Sources to cache: claim the identity, encode what is pending, fold the manifest."""
    check_flags(config)
    units = find_units(config.shards, source_options(config))
    model = resolve_model(config.model)
    cache = CachePaths(config.cache)
    records = read_units(cache)
    stale = share(stale_units(cache, records, units, config.prune), config.part)
    device = identity.choose_device(config, cache)
    settings = identity.choose_settings(config, model, keep_logvar(config, cache))
    shapes = identity.choose_shapes(config, cache, device, settings.framing.resolution)
    vae = identity.choose_vae(config, cache, model, shapes.device)
    encoders = identity.load_encoders(model, shapes, vae, settings.clip_skip, device)
    todo = plan.pending(cache, share(units, config.part), records)
    captions: list[str] = []
    seconds = None
    begun = cache.identity.exists()
    if not begun or (todo and not cache.conditioning.exists()):
        # All parts of a new cache probe the same pictures and so come to the same settings.
        captions, moments, seconds = plan.probe(todo if begun else units, settings, encoders)
        if config.latents == "auto" and not begun:
            settings = replace(settings, keep_logvar=posterior_matters(moments))
    layout = identity.expected_layout(encoders, settings)
    work = plan.estimate(todo, layout, seconds, cache)
    print(work, file=sys.stderr)
    plan.refuse_full_disk(work, cache)
    if config.dry_run:
        return
    sweep(cache.tmp)
    identity.claim(cache, model, encoders, settings, shapes, begun)
    prompts = config.preview_prompts
    if not prompts and not cache.conditioning.exists():
        prompts = tuple(dict.fromkeys(captions))[:PREVIEWS]
    add_prompts(cache, model, encoders.text, prompts)
    job = engine.Job(
        cache, model, shapes, replace(vae, rescale=encoders.vae.rescale), settings,
        config.decode_workers, config.max_reject_fraction, tuple(records),
    )  # fmt: skip
    started = time.monotonic()
    done = encode_units(config, job, todo, encoders, work.rows)
    for name in stale:  # last, because what they hold may have been copied
        (cache.units / f"{name}.json").unlink(missing_ok=True)  # another part was faster
    if stale:
        sync_folder(cache.units)
    print(f"{done.pictures} pictures and {done.captions} captions encoded, the rest copied")
    if config.part is not None:
        print(f"part {config.part} is done; after the last: prep finish --cache {cache.root}")
        return
    print(engine.finish(cache))
    if config.report:
        seconds = time.monotonic() - started
        report.write_after_encode(cache, encoders.vae.vae, done.pictures, seconds)


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
    if config.ray_address is not None and config.engine != "ray":
        raise UserError("--ray-address is for --engine ray; add that, or leave it out")


def source_options(config: config.EncodeConfig) -> SourceOptions:
    """The flags about sources. A `pipe:` may run: `parse` takes one from the command line only."""
    return SourceOptions(
        config.folder_units, config.image_column, config.caption_column, config.key_column,
        config.streaming, config.dataset_config_name, config.max_image_bytes, pipes=True,
    )  # fmt: skip


def keep_logvar(config: config.EncodeConfig, cache: CachePaths) -> bool:
    """Is the posterior's logvar stored? As flagged, else as the cache was begun."""
    if config.latents not in ("auto", "mean", "posterior"):
        raise UserError(f"--latents {config.latents!r} is not one of auto, mean, posterior")
    if config.latents == "auto" and cache.identity.exists():
        return bool(load_json(cache.identity)["latents"] == "posterior")
    return config.latents == "posterior"


def stale_units(
    cache: CachePaths, records: Sequence[UnitRecord], units: Sequence[Unit], prune: bool
) -> list[str]:
    """Units of the cache whose source is not listed any more, if they are to be dropped.

    Raises UserError if they are not: silently kept they would be trained on, silently dropped
    they would have to be encoded again.
    """
    names, sources = {unit.name for unit in units}, {unit.source for unit in units}
    stale = [record for record in records if record.name not in names]
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
    sweep(cache.tmp)
    model = resolve_model(config.model or stored["model"])
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
        print(report.write_report(cache, report.load_vae_for(cache, config)))
