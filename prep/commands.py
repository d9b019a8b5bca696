"""The commands of stage one, each told from its flags."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from diffusers import AutoencoderKL

from prep import config
from prep.cache import holdout
from prep.cache.stale import Stale, drop, find_stale, of_generation
from prep.encode import engine, networks, overwrite, plan
from prep.encode.identity import build_identity, expected_layout
from prep.encode.networks import Encoders
from prep.encode.prompts import add_prompts
from prep.encode.settings import Settings, choose_settings
from prep.encoders.vae import posterior_matters
from prep.engines.run import check_engine, part_of, run_units
from prep.filters.filters import Filters
from prep.inspect import report
from prep.rows.character_encoding import check_encoding
from prep.sources.find import SourceOptions, Unit, find_units
from prep.sources.folders.folder import repeats_in
from prep.synthesize.config import SynthesizeConfig
from shared.cache.identity import (
    Identity,
    OtherSettings,
    Shapes,
    claim_identity,
    other_settings,
    read_identity,
    refuse_other_kind,
)
from shared.cache.manifest import read_units
from shared.cache.paths import CachePaths, refuse_full_disk
from shared.cache.units import UnitRecord
from shared.cli.defaults import default_cache
from shared.cli.progress import Progress
from shared.machine import cpus
from shared.models.family import Model, resolve_model
from shared.storage.temporary import sweep

Flags = config.EncodeConfig | SynthesizeConfig
F = TypeVar("F", config.EncodeConfig, SynthesizeConfig)
MOST_DECODERS = 8  # more do not help one device, and each holds a picture


@dataclass(frozen=True)
class Chosen:
    """With what is encoded."""

    shapes: Shapes
    vae: networks.VaeChoice
    settings: Settings
    encoders: Encoders
    generation: int  # of the settings
    stored: Identity | None  # the cache's own that they were chosen by, where it has one
    new: bool  # the settings are this command's, not those of a cache that is there

    def identity(self, model: Model) -> Identity:
        """Describe them as identity.json does."""
        parts = (model, self.encoders, self.settings, self.shapes)
        return build_identity(*parts, self.generation)


@dataclass(frozen=True)
class Todo:
    """What there is to do with them."""

    units: Sequence[Unit]
    stale: Stale
    known: Sequence[UnitRecord]
    captions: Sequence[str]  # of the first pictures, where the cache has no prompts yet
    work: plan.Plan


def encode(config: config.EncodeConfig) -> None:
    """Turn sources into a cache: claim the identity, encode what is pending, fold the manifest."""
    config = with_cache(config)
    check_flags(config)
    units = find_units(config.shards, source_options(config))
    if note := repeats_in(units):
        print(note, file=sys.stderr)
    model = resolve_model(config.model)
    assert config.cache is not None
    cache = CachePaths(config.cache)
    while True:
        stored = read_identity(cache)
        refuse_other_kind(cache, stored, drawn=False)
        chosen = choose(config, stored, model)
        chosen, todo = look_ahead(config, cache, units, chosen)
        print(todo.work, file=sys.stderr)
        refuse_full_disk(cache, todo.work.peak_bytes)
        if config.dry_run:
            return
        sweep(cache.tmp)
        if claim(cache, model, chosen):
            break
        # What is measured and what is a default is decided once, by whoever begins the cache.
        print(f"note: another process has begun {cache.root}; on as it did", file=sys.stderr)
        del chosen, todo  # or a GPU would hold two sets of encoders
    if note := networks.taken_over(config, chosen.stored):
        print(note, file=sys.stderr)
    holdout.ask(cache, config.holdout)
    drop(cache, todo.stale.gone)
    encoders = chosen.encoders
    add_prompts(cache, encoders.text, config.preview_prompts, todo.captions)
    job = engine.Job(
        cache, model, chosen.shapes, replace(chosen.vae, rescale=encoders.vae.rescale),
        chosen.settings, config.decode_workers or min(cpus.cpus(), MOST_DECODERS),
        config.max_reject_fraction, tuple(todo.known), chosen.generation,
    )  # fmt: skip
    started = time.monotonic()
    done = encode_units(config, job, todo.units, encoders, todo.work.rows)
    print(done)
    conclude(config, cache, units, todo, chosen.generation)
    if config.part is None:
        fold_and_report(config, cache, units, todo, encoders.vae.vae, done.pictures, started)


def conclude(
    config: Flags, cache: CachePaths, units: Sequence[Unit], todo: Todo, generation: int
) -> None:
    """Drop units that others have replaced, once all of these are there; say what a part needs."""
    if todo.stale.replaced:  # last, because what they hold may be copied, also by another part
        known = of_generation(read_units(cache), generation)
        if not plan.pending(cache, units, known):
            drop(cache, todo.stale.replaced)
    if config.part is not None:
        print(f"part {config.part} is done; after the last: prep finish --cache {cache.root}")


def fold_and_report(
    config: Flags, cache: CachePaths, units: Sequence[Unit], todo: Todo, vae: AutoencoderKL,
    pictures: int, started: float,
) -> None:  # fmt: skip
    """Fold the manifest and write the report; `pictures` were made since `started`."""
    print(engine.finish(cache))
    # Of a cache in which nothing has changed no source is read again, not for its report either.
    changed = bool(todo.units or todo.stale.gone or todo.stale.replaced)
    if config.report and (changed or not (cache.root / "report.html").exists()):
        seconds, read = time.monotonic() - started, units if changed else ()
        report.write_after_encode(cache, vae, pictures, seconds, read)


def with_cache(config: F) -> F:
    """Name the cache after the model where no flag does, and say so in a line."""
    if config.cache is not None:
        return config
    config = replace(config, cache=default_cache(config.model))
    chosen = f"model {config.model}, cache {config.cache} (--model and --cache choose others)"
    print(chosen, file=sys.stderr)
    return config


def choose(config: config.EncodeConfig, stored: Identity | None, model: Model) -> Chosen:
    """Take flags, else what the cache was started with, else defaults; load the encoders.

    With --overwrite the settings become new where they differ from those of the cache.
    """
    device = networks.choose_device(config, stored.shapes if stored else None)
    settings = choose_settings(config, stored, model)
    shapes = networks.choose_shapes(config, stored, device, settings.framing.resolution)
    vae = networks.choose_vae(config, stored, model, shapes.device)
    encoders = networks.load_encoders(model, shapes, vae, settings.clip_skip, device)
    generation = stored.generation if stored else 0
    chosen = Chosen(shapes, vae, settings, encoders, generation, stored, new=not stored)
    if not (stored and config.overwrite) or not other_settings(stored, chosen.identity(model)):
        return chosen  # replaced already: go on
    encoders = overwrite.calibrated_anew(encoders, stored)
    return replace(chosen, encoders=encoders, generation=generation + 1, new=True)


def look_ahead(
    config: config.EncodeConfig, cache: CachePaths, units: Sequence[Unit], chosen: Chosen
) -> tuple[Chosen, Todo]:
    """Plan what is to be done; for a new cache, complete its settings by what is measured."""
    settings = chosen.settings
    records = read_units(cache)
    stale = find_stale(cache, records, units, config.prune, chosen.generation)
    known = of_generation(records, chosen.generation)
    todo = plan.pending(cache, part_of(units, config.part), known)
    captions: list[str] = []
    seconds = None
    if chosen.new or not cache.conditioning.exists():
        # All parts probe the same pictures, whichever are theirs, and so find the same prompts.
        captions, moments, seconds = plan.probe(units, settings, chosen.encoders)
        if config.latents == "auto" and not chosen.stored:
            settings = replace(settings, keep_logvar=posterior_matters(moments))
    layout = expected_layout(chosen.encoders, settings)
    work = plan.make_plan(todo, layout.stride, seconds, cache)
    return replace(chosen, settings=settings), Todo(todo, stale, known, captions, work)


def claim(cache: CachePaths, model: Model, chosen: Chosen) -> bool:
    """Begin the cache with these settings, or go on where it has the same.

    False where it was begun or replaced by another process since they were chosen, with others:
    then they are to be chosen again. Raises OtherSettings where the flags ask for others than the
    cache has.
    """
    wanted = chosen.identity(model)
    if chosen.stored is None:
        try:
            claim_identity(cache, wanted, "")
        except OtherSettings:
            return False
        return True
    if chosen.new:
        return overwrite.replace_identity(cache, chosen.stored, wanted)
    if read_identity(cache) != chosen.stored:
        return False
    if differing := other_settings(chosen.stored, wanted):
        raise OtherSettings(
            f"{cache.root} was made with other settings: {differing}; give the same flags and "
            "model, or another --cache, or replace what is there with --overwrite"
        )
    return True


def encode_units(
    config: config.EncodeConfig,
    job: engine.Job,
    units: Sequence[Unit],
    encoders: Encoders,
    rows: int,
) -> engine.Work:
    """Run the units on the engine that the flags ask for."""
    with Progress("encode", rows, "picture") as progress:
        return run_units(
            config, job, units, encoders, job.shapes.threads, progress, "rejected in this unit",
            engine.Work(),
        )  # fmt: skip


def check_flags(config: config.EncodeConfig) -> None:
    """Raise UserError for filters that cannot be understood, and flags that would be ignored."""
    Filters(config.where, config.max_pwatermark)
    if config.caption_encoding is not None:
        check_encoding(config.caption_encoding)
    check_engine(config)


def source_options(config: config.EncodeConfig) -> SourceOptions:
    """Collect the flags about sources; `pipe:` may run, for only the command line has it."""
    names = [field.name for field in fields(SourceOptions) if field.name != "pipes"]
    return SourceOptions(**{name: getattr(config, name) for name in names}, pipes=True)


def finish(config: config.FinishConfig) -> None:
    """Fold the committed units into the manifest."""
    cache = CachePaths(config.cache)
    sweep(cache.tmp)
    holdout.ask(cache, config.holdout)
    print(engine.finish(cache))
    if config.report:
        report.report(config)
