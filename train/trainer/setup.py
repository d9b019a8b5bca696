"""From flags to everything a run needs, with every check made before the first step."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from shared.cache.conditioning import TextEmbeds, load_conditioning
from shared.cache.manifest import Manifest, open_manifest
from shared.cache.paths import CachePaths
from shared.cli.config import to_dict
from shared.errors import UserError
from shared.machine.device import set_threads
from shared.models.family import Model, resolve_model
from shared.storage.files import dump_json, publish
from shared.storage.temporary import sweep
from shared.wording import counted
from train.config import DistillConfig
from train.data.bucket import open_buckets
from train.data.draws import DrawSpec
from train.data.heads import check_heads
from train.data.loader import LatentSpec, Loader
from train.data.order import Order
from train.flags import check_flags
from train.networks.precision import check_speed, speed_up
from train.networks.student import Student, build_student
from train.networks.teacher import check_fit, load_schedule
from train.objectives import OBJECTIVES
from train.objectives.objective import Loss
from train.sampling.preview import open_previews
from train.state import checkpoint, owner
from train.state.optim import base_learning_rate, build_optimizer
from train.state.restore import restore_networks, restore_optimizer
from train.state.resume_checks import run_terms
from train.state.whereabouts import told
from train.trainer.defaults import with_precision
from train.trainer.distributed import Team, as_launched
from train.trainer.metrics import Recorder
from train.trainer.plan import batches, plan, say_memory, warn_of_small_buckets, with_steps
from train.trainer.resume import as_left, finished
from train.trainer.run import Distillation
from train.trainer.trackers import check_trackers

REPLACE = (
    "wait for it, end it, choose another --run, or add --take-over where it hangs (it will write "
    "nothing more)"
)


def say_finished(config: DistillConfig) -> bool:
    """Has this very command trained and exported the run already? The main process says so."""
    said = finished(as_launched(config))
    if said and os.environ.get("RANK", "0") == "0":
        print(said)
    return bool(said)


def prepare(config: DistillConfig) -> Distillation:
    """Check and load everything. Raises UserError for what does not fit together."""
    config = settled(config)
    manifest = open_manifest(config.cache)
    model = resolve_model(config.model)
    check_fit(manifest, model, config.cache)
    check_flags(config)
    latest = checkpoint.latest_checkpoint(config.run)
    resumed = checkpoint.find_checkpoint(config.run, config.resume_from_checkpoint)
    before = None if resumed is None else checkpoint.read_progress(resumed)
    set_threads(config.threads)
    team = Team(config.device)
    batch_size, accumulation = batches(config, team, len(manifest.layouts), before)
    config = with_steps(config, batch_size, sum(shard.trained for shard in manifest.shards))
    check_speed(config, team.device, team.sharded, len(manifest.layouts))
    if team.main:
        say_memory(config, accumulation, model, manifest, team)
    objective = build_objective(config, model, team.device)
    student = build_student(model.source, config)
    terms = run_terms(config, manifest, model, student)
    speed_up(student.networks(), config, team.device)
    team.share(student)
    parameters = student.trainable()
    optimizer = build_optimizer(config, parameters)
    scaler = torch.amp.GradScaler(team.device.type, enabled=config.mixed_precision == "fp16")
    if resumed is not None and before is not None:
        check_resumed(resumed, before, terms, config)
        go_on(resumed, before, student, optimizer, scaler)
    conditioning = load_conditioning(CachePaths(config.cache).conditioning, manifest.layouts)
    begun = before or checkpoint.Progressed(0, 0, batch_size, terms)
    loader = build_loader(
        config, manifest, model, conditioning.unconditional, objective.intervals, batch_size,
        begun.position, team,
    )  # fmt: skip
    learning_rate = base_learning_rate(config, batch_size)
    run = Distillation(
        config=config,
        team=team,
        student=student,
        objective=objective,
        loader=loader,
        empty=conditioning.unconditional.to(team.device),
        optimizer=optimizer,
        scaler=scaler,
        parameters=parameters,
        learning_rate=learning_rate,
        accumulation=accumulation,
        step=begun.step,
        position=begun.position,
        terms=terms,
        recorder=Recorder(config, team, loader, begun.step),
        previews=open_previews(config, model, manifest, conditioning, team.device),
    )
    if team.main:
        warn_of_small_buckets(loader)
        print(plan(config, parameters, loader, resumed, team.world, learning_rate), file=sys.stderr)
        if not config.dry_run:
            run.branch = begin_run_folder(config, model, resumed, latest)
    team.wait()
    return run


def settled(config: DistillConfig) -> DistillConfig:
    """The same as it was launched, to go on where the run stands; precision by the device.

    Raises UserError where another process writes the run, or a tracker cannot be had.
    """
    config = with_precision(as_launched(config))
    if not config.take_over:
        owner.refuse_other(config.run, REPLACE)
    check_trackers(config.report_to)
    return as_left(config)


def check_resumed(
    folder: Path, before: checkpoint.Progressed, terms: dict[str, Any], config: DistillConfig
) -> None:
    """Raise UserError where a checkpoint is another run's, or further than this one is to go."""
    checkpoint.check_terms(folder, before.terms, terms)
    if before.step > config.max_train_steps:
        raise UserError(
            f"{folder} has {counted(before.step, 'step')} behind it, more than --max-train-steps "
            f"{config.max_train_steps}; give more, or an earlier checkpoint"
        )


def go_on(
    folder: Path,
    before: checkpoint.Progressed,
    student: Student,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Put networks, optimizer and fp16 scale into the state of a checkpoint."""
    restore_networks(folder, student)
    restore_optimizer(optimizer, student.trainable(), folder)
    if before.scaler:  # empty where the run was not in fp16 before
        scaler.load_state_dict(dict(before.scaler))


def build_objective(config: DistillConfig, model: Model, device: torch.device) -> Loss:
    """The loss that the flags ask for, with the teacher's schedule."""
    return OBJECTIVES[config.objective].build(config, load_schedule(model.source).to(device))


def build_loader(
    config: DistillConfig, manifest: Manifest, model: Model, empty: TextEmbeds, intervals: int,
    batch_size: int, position: int, team: Team,
) -> Loader:  # fmt: skip
    """This process's share of the global batches from sample `position` on."""
    buckets = open_buckets(config.cache, manifest, config.local_cache, config.max_train_samples)
    if not buckets:
        raise UserError(f"{config.cache} holds no samples to train on")
    check_heads(buckets)
    identity, family = manifest.identity, model.family
    w_min, w_max = guidance_range(config, family.w_min, family.w_max)
    return Loader(
        buckets,
        Order(tuple(map(len, buckets)), batch_size, config.seed),
        DrawSpec(
            seed=config.seed,
            views=identity.preprocessing.views,
            num_ddim_timesteps=intervals,
            w_min=w_min,
            w_max=w_max,
            proportion_empty_prompts=config.proportion_empty_prompts,
            latent_noise=identity.posterior,
            noise_offset=config.noise_offset,
        ),
        LatentSpec(identity.vae.channels, identity.vae.scaling_factor),
        empty,
        start=position // batch_size,
        rank=team.rank,
        world=team.world,
        threads=config.dataloader_num_workers,
        device=team.device,
    )


def guidance_range(config: DistillConfig, w_min: float, w_max: float) -> tuple[float, float]:
    """The flags, else the family's. Raises UserError for an empty range."""
    low = w_min if config.w_min is None else config.w_min
    high = w_max if config.w_max is None else config.w_max
    if low > high:
        raise UserError(f"--w-min {low:g} is above --w-max {high:g}")
    return low, high


def begin_run_folder(
    config: DistillConfig, model: Model, resumed: Path | None, latest: Path | None
) -> int:
    """Make the folder our own and save the resolved configuration, the model's source in it.

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
        resolved = told({**to_dict(config), "model": model.source})
        resolved["learning_rate"] = base_learning_rate(config)
        publish([dump_json(resolved)], config.run / "config.json", config.run / "tmp")
        return checkpoint.begin_branch(config.run, resumed)
    except BaseException:  # or it would seem to live on where the file system has no locks
        owner.release(config.run)
        raise
