"""What the teacher says: read from the cache, or computed in every step. Decided before a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shared.cache.answers import AnswersIdentity, AnswersManifest, embedding_hash
from shared.cache.answers_store import answers_of, open_answers
from shared.cache.conditioning import TextEmbeds
from shared.cache.identity import differences
from shared.cache.manifest import Manifest
from shared.cache.paths import CachePaths
from shared.diffusion import schedule_settings
from shared.errors import UserError
from shared.models.family import SCHEDULER_CONFIG, Model, load_config
from shared.style import FLAG, as_typed, described, marks
from shared.wording import counted
from train.config import RunConfig
from train.flag_groups import CACHED, ONLINE
from train.networks.teacher import styles_of
from train.objectives import objective_of
from train.state.checkpoint import TrainingState
from train.state.resume_checks import ANSWERS, PER_SAMPLE, answers_terms

WITHOUT = "--teacher online goes without them"


def choose_teacher(
    config: RunConfig,
    manifest: Manifest,
    model: Model,
    empty: TextEmbeds,
    before: TrainingState | None,
) -> tuple[RunConfig, AnswersManifest | None]:
    """Decide --teacher, and return the answers that are read.

    `empty` is the unconditional embedding. As given, else as the run did `before`, else cached
    where there are answers. Raises UserError, naming both sides, for answers that are not this
    teacher's. Its weights are not known yet: they are for `check_teacher`.
    """
    if not objective_of(config).reads_answers:
        return config, None
    wanted = config.teacher
    if wanted is None and before is not None:
        wanted = CACHED if ANSWERS in before.terms else ONLINE
    answers = None if wanted == ONLINE else open_answers(config.cache, manifest)
    if answers is None:
        if wanted == CACHED:
            raise UserError(
                f"--teacher cached: {folder_of(config)} holds no answers of a teacher; `prep teach "
                f"--cache {config.cache}` asks it, {WITHOUT}"
            )
        return replace(config, teacher=ONLINE), None
    check_answers(answers.identity, model, empty, config)
    if before is not None:
        answers = as_begun(answers, before.terms, config)
    return replace(config, teacher=CACHED), answers


def check_answers(
    answers: AnswersIdentity, model: Model, empty: TextEmbeds, config: RunConfig
) -> None:
    """Raise UserError where another schedule, prediction or embedding was answered for."""
    worn = styles_of(config)
    if marks(answers.styles) != marks(worn):
        remedy = f"give {as_typed(answers.styles)}" if answers.styles else f"leave {FLAG} out"
        raise UserError(
            f"{folder_of(config)} holds answers of a teacher that wears "
            f"{described(answers.styles)}, and this one wears {described(worn)}; {remedy}, or "
            f"{WITHOUT}"
        )
    here = schedule_settings(load_config(model.source, SCHEDULER_CONFIG))
    if differing := differences(schedule_settings(answers.schedule), here):
        raise UserError(
            f"{folder_of(config)} holds answers of another schedule than {model.source}'s: "
            f"{differing}; {WITHOUT}"
        )
    if (found := embedding_hash(empty)) != answers.unconditional:
        raise UserError(
            f"{folder_of(config)} holds answers to another unconditional embedding "
            f"({answers.unconditional}) than the cache's ({found}); {WITHOUT}"
        )


def check_teacher(
    answers: AnswersManifest | None, invariants: Mapping[str, Any], config: RunConfig
) -> None:
    """Raise UserError where other weights than the teacher's have answered."""
    if answers is not None and answers.identity.teacher != invariants["teacher"]:
        raise UserError(
            f"{folder_of(config)} holds answers of another teacher ({answers.identity.model}, "
            f"{answers.identity.teacher}) than {config.model} ({invariants['teacher']}); {WITHOUT}"
        )


def as_begun(
    answers: AnswersManifest, before: Mapping[str, Any], config: RunConfig
) -> AnswersManifest:
    """The answers with K as when the run began, if it began with any: more do not change it.

    Raises UserError where they are others, or fewer.
    """
    if ANSWERS not in before:
        return answers
    terms = answers_terms(answers)
    if before[ANSWERS] != terms[ANSWERS] or before[PER_SAMPLE] > answers.answers:
        then, now = ({n: found[n] for n in (ANSWERS, PER_SAMPLE)} for found in (before, terms))
        raise UserError(
            f"{folder_of(config)} holds other answers than the run began with: "
            f"{differences(then, now)}; {WITHOUT}, from here on"
        )
    return replace(answers, answers=before[PER_SAMPLE])


def grid_of(answers: AnswersManifest | None) -> int | None:
    """How many timesteps the teacher was asked at."""
    return None if answers is None else answers.identity.num_ddim_timesteps


def print_teacher(config: RunConfig, answers: AnswersManifest | None) -> None:
    """Tell the user which it is and what it wears; nothing where no teacher is asked at all."""
    if config.teacher_lora:
        print(f"the teacher wears {described(styles_of(config))}", file=sys.stderr)
    if config.teacher is None:
        return
    line: str = ONLINE
    if answers is not None:
        line = f"{counted(answers.answers, 'cached answer')} a sample ({folder_of(config)})"
        if answers.without:
            line += f"; {counted(answers.without, 'sample')} without any left out"
    print(f"teacher: {line}", file=sys.stderr)


def folder_of(config: RunConfig) -> Any:
    """Where the cache has its answers."""
    return answers_of(CachePaths(config.cache)).root
