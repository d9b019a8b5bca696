"""`prep synthesize`, told from its flags."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL

from prep.cache import holdout
from prep.cache.answers_reuse import former_answers, with_answers
from prep.cache.reuse import NOTHING, known_by_source
from prep.cache.stale import drop, find_stale
from prep.commands import Todo, conclude, fold_and_report, with_cache
from prep.encode import networks, plan
from prep.encode.prompts import PREVIEWS, add_prompts
from prep.encode.settings import Settings, check_resolution
from prep.encoders.vae import vae_identity
from prep.engines.run import check_engine, part_of, run_units
from prep.images.crop import Framing
from prep.rows.character_encoding import check_encoding
from prep.rows.unit import Unit
from prep.synthesize.caption_files import read_captions
from prep.synthesize.config import SynthesizeConfig
from prep.synthesize.draw import Job, Stock, Work, known_answers, numbered
from prep.synthesize.keeping import Keeping, choose_keeping, refuse_answers
from prep.synthesize.teacher import (
    Canvas,
    Networks,
    Teacher,
    load_text,
    refuse_steps,
    schedule_hash,
    scheduler_config,
)
from prep.synthesize.units import caption_units
from shared.cache.answers import AnswersShard
from shared.cache.answers_store import claim_answers, read_answers
from shared.cache.identity import (
    Drawn,
    Identity,
    OtherSettings,
    Preprocessing,
    Shapes,
    claim_identity,
    other_settings,
    read_identity,
    refuse_other_kind,
)
from shared.cache.layout import Layout, cache_layout
from shared.cache.manifest import read_units
from shared.cache.paths import FORMAT, CachePaths, refuse_full_disk
from shared.cache.units import UnitRecord
from shared.cli.progress import Progress
from shared.models.family import Model, native_resolution, resolve_model
from shared.models.fingerprint import fingerprint, signs
from shared.models.rescale import plain_vae
from shared.models.vae import load_vae
from shared.networks.denoiser import load_unet
from shared.networks.precision import device_precision
from shared.storage.temporary import sweep
from shared.wording import counted

DRAWN_VALUES = 8 * 128 * 128  # of one channel, drawn at once on a GPU


@dataclass(frozen=True)
class Chosen:
    """With what is drawn."""

    identity: Identity
    canvas: Canvas
    settings: Settings
    networks: Networks
    keeping: Keeping | None  # of answers
    vae: AutoencoderKL  # on the CPU: nothing but the report needs it
    stored: Identity | None  # the cache's own that it was chosen by, where it has one

    @property
    def drawn(self) -> Drawn:
        """How."""
        assert self.identity.drawn is not None
        return self.identity.drawn


def synthesize(config: SynthesizeConfig) -> None:
    """Turn captions into a cache: claim the identity, draw what is pending, fold the manifest."""
    config = with_cache(config)
    check_engine(config)
    if config.caption_encoding is not None:
        check_encoding(config.caption_encoding)
    files = read_captions(config)
    units = caption_units(files, config.per_caption, config.folder_units)
    first = [row.caption for row in files[0].rows[: 16 * PREVIEWS] if row.caption]
    model = resolve_model(config.model)
    assert config.cache is not None
    cache = CachePaths(config.cache)
    while True:
        stored = read_identity(cache)
        refuse_other_kind(cache, stored, drawn=True)
        chosen = choose(config, stored, model)
        todo = look_ahead(config, cache, units, chosen, first)
        print(todo.work, file=sys.stderr)
        refuse_full_disk(cache, todo.work.peak_bytes)
        if config.dry_run:
            return
        sweep(cache.tmp)
        if claim(cache, chosen):
            break
        print(f"note: another process has begun {cache.root}; on as it did", file=sys.stderr)
        del chosen, todo  # or a GPU would hold two teachers
    if chosen.keeping is not None:
        claim_answers(cache, chosen.keeping.identity)
    if note := networks.taken_over(config, chosen.stored):
        print(note, file=sys.stderr)
    holdout.ask(cache, config.holdout)
    drop(cache, todo.stale.gone)
    add_prompts(cache, chosen.networks.text, config.preview_prompts, todo.captions)
    job = Job(
        cache, model, chosen.identity.shapes, chosen.canvas, chosen.drawn, chosen.settings,
        config.max_reject_fraction, tuple(todo.known), chosen.keeping, kept_before(cache, chosen),
    )  # fmt: skip
    started = time.monotonic()
    done = draw_units(config, job, todo.units, chosen.networks, todo.work.rows)
    print(done)
    conclude(config, cache, units, todo, generation=0)
    if config.part is None:
        vae = chosen.vae.to(chosen.networks.teacher.device)
        fold_and_report(config, cache, units, todo, vae, done.pictures, started)


def choose(config: SynthesizeConfig, stored: Identity | None, model: Model) -> Chosen:
    """Take flags, else what the cache was started with, else defaults; load the networks.

    Raises UserError for a model that is no teacher, and for flags that it cannot follow.
    """
    shapes_there = stored.shapes if stored else None
    device = networks.choose_device(config, shapes_there)
    vae = plain_vae(load_vae(model.source))
    made = vae_identity(vae, "float32", None)
    networks.refuse_other_channels(model, model.source, made.channels)
    begun = stored.preprocessing.resolution if stored else None
    resolution = config.resolution or begun or native_resolution(model)
    check_resolution(resolution, made.downscale)
    shapes = Shapes(
        1,  # no VAE encodes
        config.text_batch_size or (stored.shapes.text_batch_size if stored else 32),
        device.type,
        networks.choose_threads(config, shapes_there, device),
    )
    canvas = Canvas(resolution, made)
    settings = Settings(Framing(resolution), False, 1, clip_skip=config.clip_skip)
    schedule = scheduler_config(model.source)
    refuse_steps(config.steps, schedule)
    scale = config.guidance_scale
    scale = float(model.family.guidance_scale if scale is None else scale)
    if config.answers:
        refuse_answers(config.answers, config.steps, config.sampler, scale, schedule)
    text = load_text(model, shapes, config.clip_skip, device)
    unet = load_unet(model.source)
    drawn = Drawn(
        fingerprint(unet), schedule_hash(config.sampler, schedule), config.sampler, config.steps,
        scale, config.per_caption, config.seed,
        *choose_batch(config, stored, device, canvas), config.answers,
    )  # fmt: skip
    weights, empty = signs(unet.parameters()) if config.answers else "", text.unconditional()
    keeping = choose_keeping(drawn, weights, model.source, schedule, empty, shapes, canvas.shape)
    teacher = Teacher(model.source, canvas, drawn, empty, device, unet)
    preprocessing = Preprocessing(resolution, views=1, max_captions=1, center_crop=True)
    identity = Identity(
        FORMAT, model.family.name, model.source, "mean", made, text.identity(), preprocessing,
        shapes, drawn=drawn,
    )  # fmt: skip
    return Chosen(identity, canvas, settings, Networks(text, teacher), keeping, vae, stored)


def choose_batch(
    config: SynthesizeConfig, stored: Identity | None, device: torch.device, canvas: Canvas
) -> tuple[int, str]:
    """Samples drawn at once and the teacher's precision: as flagged, as recorded, or by default."""
    _, height, width = canvas.shape
    fitting = 8 if device.type == "cpu" else min(64, max(1, DRAWN_VALUES // (height * width)))
    batch, precision = fitting, str(device_precision(device))
    if stored and stored.drawn:
        batch, precision = stored.drawn.batch_size, stored.drawn.mixed_precision
    return config.batch_size or batch, config.mixed_precision or precision


def look_ahead(
    config: SynthesizeConfig, cache: CachePaths, units: Sequence[Unit], chosen: Chosen,
    captions: Sequence[str],
) -> Todo:  # fmt: skip
    """Plan what is to be drawn, how large it will be and how long it may take."""
    records = read_units(cache)
    stale = find_stale(cache, records, units, config.prune, 0, "that --captions does not")
    keeping = chosen.keeping
    known = records
    if keeping is not None:
        known = with_answers(cache, records, read_answers(cache), keeping.answers)
    todo = plan.pending(cache, part_of(units, config.part), known)
    stride = layout_of(chosen).stride + (keeping.layout.stride if keeping else 0)
    work = replace(plan.make_plan(todo, stride, None, cache), verb="draw")
    copied = count_copied(cache, records, todo, chosen)
    amount = counted(work.rows, "sample")
    if keeping is not None:
        amount += f" with {counted(keeping.answers, 'answer')} each"
    if copied:
        amount += f" ({copied:,} of them copied)"
    if todo:
        seconds = (work.rows - copied) * chosen.networks.teacher.seconds_per_sample()
        work = replace(work, amount=amount, seconds=seconds)
    return Todo(todo, stale, records, captions, work)


def kept_before(cache: CachePaths, chosen: Chosen) -> tuple[AnswersShard, ...]:
    """Shards of answers that may be copied: the former manifest's, and those committed since."""
    if chosen.keeping is None:
        return ()
    former = former_answers(cache)
    records = read_answers(cache).values()
    since = [shard for record in records for shard in record.shards]
    return (*(former.shards if former else ()), *since)


def count_copied(
    cache: CachePaths, records: Sequence[UnitRecord], units: Sequence[Unit], chosen: Chosen
) -> int:
    """How many samples of the units the cache has already, with their answers."""
    known = known_by_source(cache, records)
    answers = known_answers(cache, chosen.keeping, kept_before(cache, chosen))
    return sum(
        Stock(unit.source, known.get(unit.source, NOTHING), answers).has(digest)
        for unit in units
        for _, digest in numbered(unit.rows(), chosen.drawn.seed)
    )


def layout_of(chosen: Chosen) -> Layout:
    """Derive the layout of the samples."""
    text, pooled = chosen.networks.text, chosen.networks.text.pooled_width
    return cache_layout(
        (1, *chosen.canvas.shape),
        (1, text.length, text.width),
        None if pooled is None else (1, pooled),
        micro_conditioning=pooled is not None,
    )


def claim(cache: CachePaths, chosen: Chosen) -> bool:
    """Begin the cache with these settings, or go on where it has the same.

    False where another process has begun it since they were chosen, with others. Raises
    OtherSettings where the flags ask for others than the cache has.
    """
    if chosen.stored is None:
        try:
            claim_identity(cache, chosen.identity, "")
        except OtherSettings:
            return False
        return True
    if read_identity(cache) != chosen.stored:
        return False
    if differing := other_settings(chosen.stored, chosen.identity):
        raise OtherSettings(
            f"{cache.root} was made with other settings: {differing}; give the same flags and "
            "model, or another --cache"
        )
    return True


def draw_units(
    config: SynthesizeConfig, job: Job, units: Sequence[Unit], networks: Networks, rows: int
) -> Work:
    """Run the units on the engine that the flags ask for."""
    with Progress("draw", rows, "sample") as progress:
        return run_units(
            config, job, units, networks, job.shapes.threads, progress, "rejected in this unit",
            Work(),
        )  # fmt: skip
