"""What makes a run the same run when it is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.cache.answers import AnswersManifest
from shared.cache.identity import differences
from shared.cache.manifest import Manifest
from shared.cli.config import to_dict
from shared.diffusion import schedule_settings
from shared.errors import UserError
from shared.models.family import SCHEDULER_CONFIG, Model, load_config
from shared.storage.files import dump_json
from shared.style import marks
from shared.wording import counted
from train.config import RunConfig
from train.flag_groups import TeacherFlags, names_of
from train.networks.student import Student
from train.networks.teacher import styles_of
from train.objectives import objective_of
from train.state.checkpoint import TrainingState

# Besides the objective's own flags; everything else may change.
INVARIANT_FLAGS = (
    "objective", "student", "seed", "lora_rank", "lora_alpha", "proportion_empty_prompts",
    "max_train_samples", "lora_target_modules", "use_8bit_adam",
)  # fmt: skip


TEACHER_LORA = "teacher_lora"  # what the teacher wears: hashes of files, and scales
ANSWERS, PER_SAMPLE = "answers", "answers_per_sample"  # terms of a run that reads them


def divide(
    config: RunConfig, world: int, buckets: int, before: TrainingState | None
) -> tuple[int, int]:
    """The global batch and the micro-batches it is accumulated from.

    A resumed run keeps its global batch whatever the number of processes, so that it stays the
    same run. Raises UserError where it cannot be divided.
    """
    micro_batch = config.train_batch_size * world
    batch_size = micro_batch * config.gradient_accumulation_steps
    if before is not None:
        batch_size = before.batch_size
    batch_size = config.global_batch_size or batch_size
    if batch_size % micro_batch:
        nearest = max(batch_size // micro_batch, 1) * micro_batch
        fitting = [
            n for n in range(1, config.train_batch_size + 1) if batch_size % (n * world) == 0
        ]
        way = f"--train-batch-size {fitting[-1]}" if fitting else f"--global-batch-size {nearest}"
        raise UserError(
            f"a global batch of {batch_size} does not divide by "
            f"{counted(config.train_batch_size, 'sample')} "
            f"on each of {world} processes; use {way}"
        )
    if before is not None and buckets > 1 and batch_size != before.batch_size:
        raise UserError(
            f"--global-batch-size {batch_size}: a cache of {buckets} buckets keeps the one the run "
            f"began with ({before.batch_size}), or samples would come twice; leave the flag out"
        )
    if before is not None and before.position % batch_size:
        raise UserError(
            f"--global-batch-size {batch_size}: the run stands at sample {before.position}, which "
            "is no whole number of such batches; choose one that divides it"
        )
    return batch_size, batch_size // micro_batch


def run_invariants(
    config: RunConfig,
    manifest: Manifest | None,
    model: Model,
    student: Student,
    answers: AnswersManifest | None = None,
) -> dict[str, Any]:
    """What a checkpoint remembers and a resume must repeat; `student` is as it was built.

    An export, which reads no cache, has no manifest. `answers` are the teacher's, where the run
    reads them.
    """
    shards = manifest.shards if manifest else ()
    named = [
        [shard.file, shard.count, *([shard.heldout] if shard.heldout else [])] for shard in shards
    ]
    content = dump_json([manifest and manifest.identity.family, named])
    samples = sum(shard.count for shard in shards)
    scheduler = load_config(model.source, SCHEDULER_CONFIG)
    flags = to_dict(config)
    return {
        **{name: flags[name] for name in invariant_flags(config)},
        "family": model.family.name,
        "cache": hashlib.sha256(content).hexdigest()[:16],
        **({"holdout": manifest.holdout} if manifest and manifest.holdout else {}),
        "samples": samples,  # to say of another cache how it differs
        **schedule_settings(scheduler),
        # A full fine-tuning has no teacher beside it, but weights that it began with.
        **student.origin(),
        **({TEACHER_LORA: marks(styles_of(config))} if config.teacher_lora else {}),
        **({} if answers is None else answers_terms(answers)),
    }


def invariant_flags(config: RunConfig) -> list[str]:
    """The flags that must stay the same: not rates, nor where the teacher's answers come from."""
    may_change = (*names_of(TeacherFlags), "fake_learning_rate")
    own = [name for name in objective_of(config).flags if name not in may_change]
    return [*INVARIANT_FLAGS, *own]


def answers_terms(answers: AnswersManifest) -> dict[str, Any]:
    """What a checkpoint remembers of the teacher's answers; where the teacher lay is no matter."""
    content = dump_json(answers.identity.compared())
    return {ANSWERS: hashlib.sha256(content).hexdigest()[:16], PER_SAMPLE: answers.answers}


def check_invariants(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError, naming what differs, where a run would not be the same run.

    An older version remembered fewer of them: what only one side has is not compared.
    """
    stored, wanted = ({TEACHER_LORA: [], **invariants} for invariants in (stored, wanted))
    both = (stored.keys() & wanted.keys()) - {"samples"}
    before, here = ({name: invariants[name] for name in both} for invariants in (stored, wanted))
    if differing := differences(before, here):
        then, now = (invariants.get("samples") for invariants in (stored, wanted))
        if before.get("cache") != here.get("cache") and then and now and then != now:
            raise UserError(f"{folder} belongs to a run on {other_samples(then, now)}")
        raise UserError(
            f"{folder} belongs to another run: {differing}; give the same flags, or another --run"
        )


def other_samples(then: int, now: int) -> str:
    """How a cache has changed since a run began, and how to go on."""
    changed = f"grown by {now - then:,}" if now > then else f"shrunk by {then - now:,}"
    return (
        f"{then:,} samples, and the cache has {changed} to {now:,} since; a run keeps the data it "
        "began with: train another --run on these, or encode the former --shards into another "
        "--cache and give this run that one"
    )
