"""From flags to everything a run needs, with every check made before the first step."""

from __future__ import annotations

import hashlib
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shared.cache import CachePaths, Manifest, open_manifest
from shared.conditioning import TextEmbeds, load_conditioning
from shared.config import to_dict
from shared.device import pick_device, set_threads
from shared.errors import UserError
from shared.family import Model, resolve_model
from shared.storage import dump_json, publish, sweep
from train import checkpoint
from train.config import DistillConfig
from train.draws import DrawSpec
from train.export import export_student
from train.loader import LatentSpec, Loader, open_buckets
from train.objectives.lcd import LCD
from train.optim import LEARNING_RATES, base_learning_rate, build_optimizer, check_schedule
from train.order import Order
from train.plan import plan, say_memory, warn_of_small_buckets, with_steps
from train.preview import Previews, open_previews
from train.record import Recorder
from train.speed import autocast, check_speed, speed_up
from train.student import Student, build_student
from train.teacher import check_fit, load_schedule

# What makes a run another run; everything else may change when it is resumed.
TERMS = (
    "student", "seed", "train_batch_size", "gradient_accumulation_steps", "num_ddim_timesteps",
    "w_min", "w_max", "loss_type", "huber_c", "timestep_scaling_factor", "ema_decay", "lora_rank",
    "lora_alpha", "lora_target_modules", "proportion_empty_prompts", "unet_time_cond_proj_dim",
    "use_8bit_adam",
)  # fmt: skip


@dataclass
class Distillation:
    """A run, ready to go on from `first_step`."""

    config: DistillConfig
    device: torch.device
    student: Student
    objective: LCD
    loader: Loader
    empty: TextEmbeds
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    first_step: int
    terms: dict[str, Any]
    recorder: Recorder
    previews: Previews | None

    def autocast(self) -> AbstractContextManager[Any]:
        """The one dtype in which all networks compute."""
        return autocast(self.config.mixed_precision, self.device)

    def save(self, step: int) -> None:
        """Write a checkpoint, unless the weights are no longer finite."""
        self.recorder.flush(step)
        if not all(p.isfinite().all() for p in self.parameters.values()):
            raise UserError(self.recorder.diverged(step))
        progressed = checkpoint.Progressed(step, step * self.loader.order.batch_size, self.terms)
        folder = checkpoint.save_checkpoint(
            self.config.run,
            progressed,
            self.student.state(),
            checkpoint.optimizer_state(self.optimizer, self.parameters),
            self.config.checkpoints_total_limit,
        )
        self.recorder.say(f"saved {folder}")

    def preview(self, step: int) -> None:
        """Draw the preview prompts with the student as it stands."""
        if self.previews is not None:
            path, sheet = self.previews.draw(self.student.drawing(), step)
            self.recorder.picture(step, sheet)
            self.recorder.say(f"drew {path}")

    def export(self) -> None:
        """Write the student in diffusers' format."""
        print(f"student: {export_student(self.student.exported(), self.config.run)}")


def prepare(config: DistillConfig) -> Distillation:
    """Check and load everything. Raises UserError for what does not fit together."""
    manifest = open_manifest(config.cache)
    model = resolve_model(config.model)
    check_fit(manifest, model, config.cache)
    check_flags(config)
    config = with_steps(config, manifest.totals["written"])
    resumed = checkpoint.find_checkpoint(config.run, config.resume_from_checkpoint)
    terms = run_terms(config, manifest, model)
    if resumed is not None:
        checkpoint.check_terms(resumed, checkpoint.read_progress(resumed).terms, terms)
    set_threads(config.threads)
    device = pick_device(config.device)
    check_speed(config, device)
    say_memory(config, model, manifest, device)
    student = build_student(model.source, config, device)
    speed_up(student.networks(), config, device)
    parameters = student.trainable()
    optimizer = build_optimizer(config, parameters)
    done = 0
    if resumed is not None:
        student.load_state(checkpoint.load_networks(resumed))
        checkpoint.restore_optimizer(optimizer, parameters, checkpoint.load_optimizer(resumed))
        done = checkpoint.read_progress(resumed).step
    conditioning = load_conditioning(CachePaths(config.cache).conditioning)
    loader = build_loader(config, manifest, model, conditioning.unconditional, done)
    warn_of_small_buckets(loader)
    learning_rate = base_learning_rate(config)
    print(plan(config, manifest, parameters, loader, resumed, learning_rate), file=sys.stderr)
    if not config.dry_run:
        begin_run_folder(config, model)
    return Distillation(
        config=config,
        device=device,
        student=student,
        objective=build_objective(config, model, device),
        loader=loader,
        empty=conditioning.unconditional.to(device),
        optimizer=optimizer,
        parameters=parameters,
        learning_rate=learning_rate,
        first_step=done + 1,
        terms=terms,
        recorder=Recorder(config, done),
        previews=open_previews(config, model, manifest, conditioning, device),
    )


def check_flags(config: DistillConfig) -> None:
    """Raise UserError for numbers that cannot work."""
    for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps",
                 "logging_steps", "dataloader_num_workers", "lora_rank"):  # fmt: skip
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    check_schedule(config)
    if config.seed < 0:
        raise UserError(f"--seed {config.seed} must not be negative")
    if config.num_ddim_timesteps < 1 or 1000 % config.num_ddim_timesteps:
        raise UserError(f"--num-ddim-timesteps {config.num_ddim_timesteps} must divide 1000")


def run_terms(config: DistillConfig, manifest: Manifest, model: Model) -> dict[str, Any]:
    """What a checkpoint remembers and a resume must repeat."""
    shards = [[shard.file, shard.count] for shard in manifest.shards]
    content = dump_json([manifest.identity["family"], shards])
    flags = to_dict(config)
    return {
        **{name: flags[name] for name in TERMS},
        "family": model.family.name,
        "cache": hashlib.sha256(content).hexdigest()[:16],
    }


def build_objective(config: DistillConfig, model: Model, device: torch.device) -> LCD:
    """Latent consistency distillation with the teacher's schedule."""
    return LCD(
        schedule=load_schedule(model.source).to(device),
        num_ddim_timesteps=config.num_ddim_timesteps,
        timestep_scaling=config.timestep_scaling_factor,
        loss_type=config.loss_type,
        huber_c=config.huber_c,
    )


def build_loader(
    config: DistillConfig, manifest: Manifest, model: Model, empty: TextEmbeds, done: int
) -> Loader:
    """Batches from optimizer step `done` on."""
    buckets = open_buckets(config.cache, manifest)
    if not buckets:
        raise UserError(f"{config.cache} holds no samples")
    identity, family = manifest.identity, model.family
    w_min, w_max = guidance_range(config, family.w_min, family.w_max)
    batch_size = config.train_batch_size * config.gradient_accumulation_steps
    return Loader(
        buckets,
        Order(tuple(map(len, buckets)), batch_size, config.seed),
        DrawSpec(
            seed=config.seed,
            views=identity["preprocessing"]["views"],
            num_ddim_timesteps=config.num_ddim_timesteps,
            w_min=w_min,
            w_max=w_max,
            proportion_empty_prompts=config.proportion_empty_prompts,
            latent_noise=identity["latents"] == "posterior",
        ),
        LatentSpec(identity["vae"]["channels"], identity["vae"]["scaling_factor"]),
        empty,
        start=done,
        threads=config.dataloader_num_workers,
    )


def guidance_range(config: DistillConfig, w_min: float, w_max: float) -> tuple[float, float]:
    """The flags, else the family's. Raises UserError for an empty range."""
    low = w_min if config.w_min is None else config.w_min
    high = w_max if config.w_max is None else config.w_max
    if low > high:
        raise UserError(f"--w-min {low:g} is above --w-max {high:g}")
    return low, high


def begin_run_folder(config: DistillConfig, model: Model) -> None:
    """Make the folder and save the resolved configuration, the model's source in it."""
    sweep(config.run / "tmp")
    resolved = {**to_dict(config), "model": model.source}
    resolved["learning_rate"] = config.learning_rate or LEARNING_RATES[config.student]
    publish([dump_json(resolved)], config.run / "config.json", config.run / "tmp")
