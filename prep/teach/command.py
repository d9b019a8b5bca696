"""`prep teach`: from flags to a cache with answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prep.cache.answers_fold import publish_fold
from prep.cache.answers_reuse import with_answers
from prep.config import TeachConfig
from prep.encode import networks
from prep.engines.run import check_engine, part_of, run_units
from prep.teach.questions import Asking, read_samples
from prep.teach.teacher import Teacher
from prep.teach.unit import TeachJob, Work
from shared.cache.answers import (
    FORMAT,
    AnswersIdentity,
    answers_layout,
    answers_spec,
    embedding_hash,
)
from shared.cache.answers_store import (
    again,
    answered,
    answers_of,
    claim_answers,
    open_answers,
    read_answers,
    read_answers_identity,
)
from shared.cache.conditioning import TextEmbeds, load_conditioning
from shared.cache.manifest import Manifest, open_manifest, read_units
from shared.cache.paths import CachePaths, refuse_full_disk
from shared.cache.units import Shard, UnitRecord
from shared.cli.defaults import MODEL, default_cache
from shared.cli.progress import Progress
from shared.diffusion import nearest_divisor, schedule_settings
from shared.errors import UserError
from shared.models.family import SCHEDULER_CONFIG, Model, load_config, recorded_model, resolve_model
from shared.networks.cache_checks import check_fit
from shared.networks.precision import device_precision
from shared.storage.files import free_bytes
from shared.storage.temporary import sweep
from shared.style import FLAG, as_typed, described, marks, open_styles
from shared.wording import counted, duration, size_of

SOLVER_STEPS = 50  # the default of `train distill --num-ddim-timesteps`
LATENTS_AT_ONCE = 16 * 64 * 64  # elements of a channel: 16 answers of 512 px


@dataclass(frozen=True)
class Asked:
    """A cache and what is to be asked about it."""

    cache: CachePaths
    manifest: Manifest
    model: Model
    identity: AnswersIdentity
    empty: TextEmbeds
    teacher: Teacher
    new: bool  # nothing was asked before

    @property
    def asking(self) -> Asking:
        """How questions are drawn."""
        samples = self.manifest.identity
        spec = answers_spec(self.identity, samples)
        return Asking(spec, samples.vae.channels, samples.vae.scaling_factor)


def teach(config: TeachConfig) -> None:
    """Ask the teacher about what has no answers yet, and fold them into their manifest."""
    check_engine(config)
    if config.cache is None:
        config = replace(config, cache=default_cache(config.model or MODEL))
    assert config.cache is not None
    cache = CachePaths(config.cache)
    manifest = open_manifest(config.cache)
    units = finished_units(cache, manifest)
    asked = choose(config, cache, manifest)
    count = at_least(config, cache, asked)
    complete = {unit.name for unit in with_answers(cache, units, read_answers(cache), count)}
    todo = [unit for unit in part_of(units, config.part) if unit.name not in complete]
    announce(asked, todo, count)
    if config.dry_run:
        return
    sweep(cache.tmp)
    claim_answers(cache, asked.identity)
    job = TeachJob(cache, asked.model.source, asked.identity, asked.asking, asked.empty, count)
    samples = sum(unit.written for unit in todo)
    with Progress("teach", samples, "sample") as progress:
        done = run_units(
            config, job, todo, asked.teacher, asked.identity.threads, progress,
            "without answers in this unit", Work(),
        )  # fmt: skip
    print(done)
    print(finish(cache, asked.identity, units, count, config.part))


def finished_units(cache: CachePaths, manifest: Manifest) -> list[UnitRecord]:
    """Return the units with samples. Raises UserError where the manifest is not theirs."""
    units = read_units(cache)
    if [shard.file for unit in units for shard in unit.shards] != [s.file for s in manifest.shards]:
        raise UserError(
            f"{cache.root}: its units are not those of its manifest; run the same "
            f"`{manifest.identity.command}` to its end, or `prep finish`"
        )
    return [unit for unit in units if unit.shards]


def choose(config: TeachConfig, cache: CachePaths, manifest: Manifest) -> Asked:
    """Take the flags, else what the answers were begun with, else defaults; load the teacher.

    Raises UserError for a teacher that does not fit the cache, and where answers are kept already.
    """
    stored = read_answers_identity(cache)
    if stored is not None and stored.trajectory:
        raise UserError(
            f"{answers_of(cache).root} holds answers that were kept while the samples were drawn "
            "(`prep synthesize --answers`), and others do not mix with them; delete that folder to "
            "ask the teacher anew"
        )
    model = resolve_model(config.model or recorded_model(manifest.identity.model))
    check_fit(manifest, model, cache.root)
    schedule = schedule_settings(load_config(model.source, SCHEDULER_CONFIG))
    total = schedule["num_train_timesteps"]
    steps = config.num_ddim_timesteps or (stored.num_ddim_timesteps if stored else SOLVER_STEPS)
    if total % steps:
        raise UserError(
            f"--num-ddim-timesteps {steps} must divide {total}, the timesteps there are; the "
            f"nearest that does is {nearest_divisor(steps, total)}"
        )
    device = networks.choose_device(config, stored, "delete its answers/ to ask anew")
    threads = networks.choose_threads(config, stored, device)
    empty = load_conditioning(cache.conditioning, manifest.layouts).unconditional
    size = config.batch_size or (stored.batch_size if stored else batch_size_of(manifest))
    precision = config.mixed_precision or (
        stored.mixed_precision if stored else device_precision(device)
    )
    styles = open_styles(config.teacher_lora)
    if stored is not None and marks(stored.styles) != marks(styles):
        raise UserError(
            f"{cache.root} holds answers of a teacher that wears {described(stored.styles)}, and "
            f"this one wears {described(styles)}; "
            f"give {as_typed(stored.styles) or 'no ' + FLAG}, or delete its answers/ to ask anew"
        )
    teacher = Teacher(model.source, device, size, precision, steps, threads, styles)
    seed = config.seed if config.seed is not None else (stored.seed if stored else 0)
    identity = AnswersIdentity(
        FORMAT, model.source, teacher.signs, schedule, steps, seed, precision, config.dtype,
        embedding_hash(empty), size, device.type, threads, styles=styles,
    )  # fmt: skip
    return Asked(cache, manifest, model, identity, empty, teacher, new=stored is None)


def batch_size_of(manifest: Manifest) -> int:
    """Return 16 for latents of 64 x 64, or as many larger or smaller ones as fit beside them."""
    areas = [height * width for height, width in (lay.latent_size for lay in manifest.layouts)]
    return min(64, max(1, LATENTS_AT_ONCE // max(areas)))


def at_least(config: TeachConfig, cache: CachePaths, asked: Asked) -> int:
    """Return the answers of each sample: as many as the flag says, or as there are, if more."""
    stored = None if asked.new else open_answers(cache.root, check_sizes=False)
    kept = stored.answers if stored else 0
    if kept > config.answers:
        print(f"note: {kept} answers of each sample are there, and stay", file=sys.stderr)
    return max(config.answers, kept)


def announce(asked: Asked, todo: Sequence[UnitRecord], count: int) -> None:
    """Say what will be asked, its bytes and hours. Raises UserError where the disk is too small.

    How long a batch takes is measured where nothing was asked before.
    """
    cache, free = asked.cache, size_of(free_bytes(asked.cache.disk))
    if not todo:
        print(f"nothing to ask: every sample has its answers; {free} free", file=sys.stderr)
        return
    shards = [shard for unit in todo for shard in unit.shards]
    sizes = [answers_bytes(asked, shard, count) for shard in shards]
    samples = sum(shard.count for shard in shards)
    long = ""
    if asked.new:
        per_answer = seconds_per_answer(asked, shards[0])
        long = f", {duration(per_answer * samples * count)}"
    identity = asked.identity
    worn = f" with {described(identity.styles)}" if identity.styles else ""
    print(
        f"teacher {identity.model}{worn}, {counted(samples, 'sample')} of "
        f"{counted(len(todo), 'unit')}, {counted(count, 'answer')} each at "
        f"{identity.num_ddim_timesteps} timesteps, precision "
        f"{identity.mixed_precision}: {size_of(sum(sizes))}{long}; {free} free",
        file=sys.stderr,
    )
    refuse_full_disk(cache, sum(sizes) if cache.disk == cache.root else max(sizes))


def answers_bytes(asked: Asked, shard: Shard, count: int) -> int:
    """Return the bytes of the answers of one shard's samples."""
    channels = asked.manifest.identity.vae.channels
    layout = answers_layout(count, channels, shard.layout.latent_size, asked.identity.dtype)
    return layout.shard_bytes(shard.count)


def seconds_per_answer(asked: Asked, shard: Shard) -> float:
    """Measure a batch of questions about the shard's first sample."""
    sample = next(read_samples(asked.cache.root / shard.file, shard.layout, shard.count))
    questions = [asked.asking.question(sample, n) for n in range(asked.teacher.batch_size)]
    return asked.teacher.seconds(questions, asked.empty) / asked.teacher.batch_size


def finish(
    cache: CachePaths, identity: AnswersIdentity, units: Sequence[UnitRecord], count: int,
    part: str | None,
) -> str:  # fmt: skip
    """Fold the records of all units into the manifest, if all are there; returns a line.

    Raises UserError where another process has taken away, or overwritten, what this one wrote.
    """
    records = read_answers(cache)
    missing = [unit for unit in units if not answered(records.get(unit.name), unit, count)]
    if missing:
        if part is None:
            raise UserError(
                f"{cache.root}: another process has changed {counted(len(missing), 'unit')} "
                f"meanwhile (first: {missing[0].name}); {again(identity)}"
            )
        return f"part {part} is done; {counted(len(missing), 'unit')} left to the other parts"
    manifest = publish_fold(cache, identity, units, records)
    total = sum(shard.size for shard in manifest.shards)
    without = manifest.without
    aside = f"; {counted(without, 'sample')} without, for they are not finite" if without else ""
    return (
        f"{answers_of(cache).root}: {counted(manifest.answers, 'answer')} of each of "
        f"{counted(sum(s.count for s in manifest.shards) - without, 'sample')}, {size_of(total)} "
        f"in {counted(len(manifest.shards), 'shard')}{aside}"
    )
