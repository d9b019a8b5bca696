"""From flags to everything a run needs, with every check made before the first step."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shared.cache.answers import AnswersManifest, answers_spec
from shared.cache.conditioning import TextEmbeds, load_conditioning
from shared.cache.draws import DrawSpec
from shared.cache.manifest import Manifest, open_manifest
from shared.cache.paths import CachePaths
from shared.cli.config import to_dict
from shared.errors import UserError
from shared.machine.device import set_threads
from shared.models.family import Model, resolve_model
from shared.networks.cache_checks import check_fit
from shared.networks.denoiser import load_schedule
from shared.storage.files import dump_json, publish
from shared.storage.temporary import sweep
from shared.wording import counted
from train.config import RunConfig
from train.data.answers import answered, open_bucket_answers
from train.data.bucket import open_buckets
from train.data.loader import LatentSpec, Loader
from train.data.order import Order
from train.data.shard_check import check_answer_heads, check_heads
from train.flags import check_flags
from train.networks.build import build_student
from train.networks.precision import check_speed, speed_up
from train.networks.student import Student
from train.networks.teacher import styles_of
from train.objectives import guidance_range, objective_of
from train.objectives.objective import Loss
from train.sampling.preview import open_previews
from train.state import checkpoint, owner
from train.state.optim import base_learning_rate
from train.state.restore import Moments, restore_networks, restore_optimizers
from train.state.resume_checks import check_invariants, run_invariants
from train.state.run_paths import to_keep
from train.trainer.defaults import with_precision
from train.trainer.distributed import Distributed, as_launched
from train.trainer.init_student import INIT_STUDENT, begin
from train.trainer.plan import (
    batches,
    evaluation_plan,
    note_small_buckets,
    plan,
    print_memory,
    with_steps,
)
from train.trainer.reporting.evaluating import open_evaluations
from train.trainer.reporting.metrics import Recorder
from train.trainer.reporting.trackers import check_trackers
from train.trainer.resume import as_left
from train.trainer.run import Distillation
from train.trainer.teacher import check_teacher, choose_teacher, grid_of, print_teacher
from train.trainer.trainable import Trainable, build_trainables

REPLACE = (
    "wait for it, end it, choose another --run, or add --take-over where it hangs (it will write "
    "nothing more)"
)


def prepare(config: RunConfig) -> Distillation:
    """Check and load everything. Raises UserError for what does not fit together."""
    config = settled(config)
    manifest = open_manifest(config.cache)
    model = resolve_model(config.model)
    check_fit(manifest, model, config.cache)
    check_flags(config)
    latest = checkpoint.latest_checkpoint(config.run)
    resumed = checkpoint.find_checkpoint(config.run, config.resume_from_checkpoint)
    before = None if resumed is None else checkpoint.read_progress(resumed)
    conditioning = load_conditioning(CachePaths(config.cache).conditioning, manifest.layouts)
    empty = conditioning.unconditional
    config, answers = choose_teacher(config, manifest, model, empty, before)
    served = answered(manifest, answers)
    set_threads(config.threads)
    distributed = Distributed(config.device)
    batch_size, accumulation = batches(config, distributed, len(manifest.layouts), before)
    config = with_steps(config, batch_size, sum(shard.trained for shard in served.shards))
    check_speed(config, distributed.device, distributed.fsdp, len(manifest.layouts))
    print_memory(config, accumulation, model, manifest, distributed)
    schedule = load_schedule(model.source).to(distributed.device)
    objective = objective_of(config).build(config, schedule, grid_of(answers))
    student, invariants = build_networks(config, manifest, model, answers, distributed, before)
    trained = build_trainables(config, student, batch_size)
    scaler = torch.amp.GradScaler(distributed.device.type, enabled=config.mixed_precision == "fp16")
    if resumed is not None and before is not None:
        check_resumed(resumed, before, invariants, config)
        go_on(resumed, before, student, trained, scaler)
    start = before or checkpoint.TrainingState(0, 0, batch_size, invariants)
    loader = build_loader(
        config, served, model, empty, objective, batch_size, start.position,
        distributed, answers,
    )  # fmt: skip
    previews = open_previews(config, model, manifest, conditioning, distributed.device)
    run = Distillation(
        config=config,
        distributed=distributed,
        student=student,
        objective=objective,
        loader=loader,
        empty=empty.to(distributed.device),
        trained=trained,
        scaler=scaler,
        accumulation=accumulation,
        step=start.step,
        position=start.position,
        invariants=invariants,
        recorder=Recorder(config, distributed, loader, start.step),
        previews=previews,
        evaluations=open_evaluations(
            config, model, student, distributed, start.step, previews and previews.vae
        ),
    )
    if distributed.main:
        announce(run, model, answers, resumed)
        if not config.dry_run:
            run.branch = start_run_folder(config, model, resumed, latest, invariants)
    distributed.wait()
    return run


def announce(
    run: Distillation, model: Model, answers: AnswersManifest | None, resumed: Path | None
) -> None:
    """Say what is about to happen."""
    note_small_buckets(run.loader)
    print_teacher(run.config, answers)
    lines = [plan(run, resumed), *evaluation_plan(run, model)]
    print("\n".join(lines), file=sys.stderr)


def build_networks(
    config: RunConfig, manifest: Manifest, model: Model, answers: AnswersManifest | None,
    distributed: Distributed, before: checkpoint.TrainingState | None,
) -> tuple[Student, dict[str, Any]]:  # fmt: skip
    """The student on its device, and what its checkpoints remember."""
    student = build_student(model.source, config)
    invariants = run_invariants(config, manifest, model, student, answers)
    check_teacher(answers, invariants, config)
    if (begun := begin(student, config, before)) is not None:
        invariants[INIT_STUDENT] = begun
    speed_up(student.networks(), config, distributed.device)
    distributed.wrap(student)
    return student, invariants


def settled(config: RunConfig) -> RunConfig:
    """The same as it was launched, to go on where the run stands; precision by the device.

    Raises UserError where another process writes the run, or a tracker cannot be had.
    """
    config = with_precision(as_launched(config))
    if not config.take_over:
        owner.refuse_other(config.run, REPLACE)
    check_trackers(config.report_to)
    return as_left(config)


def check_resumed(
    folder: Path, before: checkpoint.TrainingState, invariants: dict[str, Any], config: RunConfig
) -> None:
    """Raise UserError where a checkpoint is another run's, or further than this one is to go."""
    check_invariants(folder, before.terms, invariants)
    if before.step > config.max_train_steps:
        raise UserError(
            f"{folder} has {counted(before.step, 'step')} behind it, more than --max-train-steps "
            f"{config.max_train_steps}; give more, or an earlier checkpoint"
        )


def go_on(
    folder: Path,
    before: checkpoint.TrainingState,
    student: Student,
    trained: Sequence[Trainable],
    scaler: torch.amp.GradScaler,
) -> None:
    """Put networks, optimizers and fp16 scale into the state of a checkpoint."""
    restore_networks(folder, student)
    moments = [
        Moments(one.optimizer, one.parameters, one.has_moved(before.step)) for one in trained
    ]
    restore_optimizers(folder, moments)
    if before.scaler:  # empty where the run was not in fp16 before
        scaler.load_state_dict(dict(before.scaler))


def build_loader(
    config: RunConfig, manifest: Manifest, model: Model, empty: TextEmbeds, objective: Loss,
    batch_size: int, position: int, distributed: Distributed, answers: AnswersManifest | None,
) -> Loader:  # fmt: skip
    """This process's share of the global batches from sample `position` on."""
    buckets = open_buckets(config.cache, manifest, config.local_cache, config.max_train_samples)
    if not buckets:
        raise UserError(f"{config.cache} holds no samples to train on")
    check_heads(buckets)
    identity, family = manifest.identity, model.family
    read = None
    if answers is not None:
        spec = answers_spec(answers.identity, identity)
        read = open_bucket_answers(config.cache, buckets, answers, spec)
        check_answer_heads(buckets, read)
    w_min, w_max = guidance_range(config, family)
    return Loader(
        buckets,
        Order(tuple(map(len, buckets)), batch_size, config.seed),
        DrawSpec(
            seed=config.seed,
            views=identity.preprocessing.views,
            num_ddim_timesteps=objective.intervals,
            w_min=w_min,
            w_max=w_max,
            proportion_empty_prompts=config.proportion_empty_prompts,
            latent_noise=identity.posterior,
            noise_offset=config.noise_offset,
            uniforms=objective.uniforms,
            noises=objective.noises,
        ),
        LatentSpec(identity.vae.channels, identity.vae.scaling_factor),
        empty,
        start=position // batch_size,
        rank=distributed.rank,
        world=distributed.world,
        threads=config.dataloader_num_workers,
        device=distributed.device,
        answers=read,
    )


def start_run_folder(
    config: RunConfig,
    model: Model,
    resumed: Path | None,
    latest: Path | None,
    invariants: Mapping[str, Any],
) -> int:
    """Make the folder our own and save the resolved configuration, the model's source in it.

    Of the `invariants` it has the fingerprint of the weights that --init-student names.
    Returns the branch of the checkpoints to come (state/checkpoint.py). Raises UserError where the
    run has come further than `latest`, which was its latest checkpoint when this command began.
    """
    owner.take(config.run, "train distill", REPLACE, config.take_over)
    try:
        if checkpoint.latest_checkpoint(config.run) != latest:
            raise UserError(
                f"another process has gone on with {config.run} meanwhile; "
                "give the same command again"
            )
        sweep(config.run / "tmp")
        kept = to_keep(replace(config, model=model.source))
        kept = replace(kept, learning_rate=base_learning_rate(config))
        stored = {**to_dict(kept), "init_fingerprint": invariants.get(INIT_STUDENT)}
        stored["teacher_lora_sha256"] = [style.sha256 for style in styles_of(config)]
        publish([dump_json(stored)], config.run / "config.json", config.run / "tmp")
        return checkpoint.start_branch(config.run, resumed)
    except BaseException:  # or it would seem to live on where the file system has no locks
        owner.release(config.run)
        raise
