"""The same command given again: it goes on, says that it has finished, or what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.cache.identity import differences
from shared.cli.config import to_dict
from shared.errors import UserError
from shared.storage.ownership import absolute
from shared.style import Style, marks, split_scale
from train.config import EvaluationFlags, RunConfig
from train.export.model_card import CARD_FILE
from train.export.provenance import SCHEDULER_FILE
from train.export.student import student_file
from train.export.weights import weight_files
from train.flag_groups import names_of
from train.networks.teacher import styles_of
from train.state import checkpoint
from train.state.optim import base_learning_rate
from train.state.resume_checks import TEACHER_LORA, invariant_flags
from train.state.run_config import run_config
from train.state.tensor_files import is_whole

# Flags that may differ, since the student does not depend on them. Cache, teacher and VAE are known
# by their contents, wherever they lie (state/resume_checks.py, networks/cache_checks.py).
FREE = frozenset({
    "model", "cache", "run", "vae", "resume_from_checkpoint", "take_over", "dry_run",
    "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "validation_prompts",
    *names_of(EvaluationFlags),
    "logging_steps", "report_to", "logging_dir", "tracker_project_name", "dataloader_num_workers",
    "local_cache", "threads", "device", "push_to_hub", "hub_model_id", "compile", "attention",
    "gradient_checkpointing", "offload_ema", "allow_tf32", "teacher", "init_fingerprint",
    "teacher_lora_sha256",
})  # fmt: skip
LATEST = "latest"


def as_left(config: RunConfig) -> RunConfig:
    """The same, to go on from the latest checkpoint where the run has begun and nothing differs.

    A checkpoint that was asked for is left to the checks of what must stay the same. Raises
    UserError, naming what differs, where a run has begun with other flags.
    """
    saved = checkpoint.whole_checkpoints(config.run)
    if config.resume_from_checkpoint not in (None, LATEST):
        return config
    if saved and config.resume_from_checkpoint == LATEST:
        return config
    if not (saved or has_metrics(config.run)) or not (config.run / "config.json").is_file():
        return config
    stored = run_config(config.run)
    if changed := changes(stored, config):
        free = saved and not changed.keys() & set(invariant_flags(config))
        before, here = ({name: pair[side] for name, pair in changed.items()} for side in (0, 1))
        way = "--resume-from-checkpoint latest goes on with these" if free else "give the former"
        raise UserError(
            f"{config.run} was begun with other flags: {differences(before, here)}; {way}, "
            "or choose another --run"
        )
    return replace(config, resume_from_checkpoint=LATEST)


def has_metrics(run: Path) -> bool:
    """Are there lines that would be written over?"""
    log = run / "metrics.jsonl"
    return log.is_file() and log.stat().st_size > 0


def changes(stored: RunConfig, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """What the student depends on and was otherwise when the run began: both values.

    Flags that are younger than the run had their defaults.
    """
    wanted = to_dict(replace(located(config), learning_rate=base_learning_rate(config)))
    before = to_dict(located(stored))
    # What the teacher wears is known by the files' contents, and a run remembers those.
    before[TEACHER_LORA], wanted[TEACHER_LORA] = recorded_marks(stored), marks(styles_of(config))
    names = wanted.keys() - FREE
    if config.num_train_epochs is not None:
        names -= {"max_train_steps"}  # follows from the cache
    return {name: (before[name], wanted[name]) for name in names if before[name] != wanted[name]}


def recorded_marks(stored: RunConfig) -> list[str]:
    """What the teacher of a run wears, by what its config.json says."""
    scales = [split_scale(text)[1] for text in stored.teacher_lora]
    pairs = zip(stored.teacher_lora_sha256, scales, strict=False)
    return [Style("", scale, sha256).mark for sha256, scale in pairs]


def located(config: RunConfig) -> RunConfig:
    """The same with the one path that counts by where it leads, however it was typed."""
    if config.init_student is None:
        return config
    return replace(config, init_student=absolute(config.init_student))


def finished_message(config: RunConfig) -> str:
    """What to say where this very command has done all it could; else nothing.

    The model card is the last file of an export, so one that is older than the last checkpoint
    belongs to a former one.
    """
    run = config.run
    if config.resume_from_checkpoint not in (None, LATEST) or config.push_to_hub:
        return ""
    last = checkpoint.latest_checkpoint(run)
    if last is None or not (run / "config.json").is_file():
        return ""
    stored = run_config(run)
    _, step = checkpoint.age(last)
    if changes(stored, config) or step < stored.max_train_steps:
        return ""
    student = student_file(run, stored)
    card = run / CARD_FILE
    weights = [run / name for name in weight_files(stored.student, stored.export_dtype)]
    beside = (run / SCHEDULER_FILE, card)
    if not (all(map(is_whole, weights)) and all(path.is_file() for path in beside)):
        return ""
    if card.stat().st_mtime_ns < (last / checkpoint.STATE).stat().st_mtime_ns:
        return ""
    return (
        f"{run} is finished: all {step} steps are taken and the student is in {student}; a larger "
        "--max-train-steps with --resume-from-checkpoint latest goes further"
    )
