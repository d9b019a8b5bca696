"""`train export`: a checkpoint of a run becomes a student."""

from __future__ import annotations

from pathlib import Path

from shared.cli.config import coerce
from shared.errors import UserError
from shared.models.family import recorded_model, resolve_model
from shared.storage.files import guard
from train.config import DistillConfig, ExportConfig
from train.export.hub import check_push
from train.export.student import NO_CACHE, publish_export, run_config, write_export
from train.networks.student import build_student
from train.state.checkpoint import (
    check_invariants,
    find_checkpoint,
    read_progress,
    whole_checkpoints,
)
from train.state.restore import restore_networks
from train.state.resume_checks import run_invariants


def export_checkpoint(config: ExportConfig) -> Path:
    """Export a checkpoint of a run, with its card; publish it if asked to.

    Raises UserError where there is none, where it is of another run, or where the hub refuses.
    """
    check_push(config)
    stored = run_config(config.run)
    checkpoint = wanted_checkpoint(config)
    folder = config.output or config.run
    with guard(folder):
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
    distilled = DistillConfig(**coerce(DistillConfig, stored))
    model = resolve_model(config.model or recorded_model(str(distilled.model)))
    student = build_student(model.source, distilled)
    before = read_progress(checkpoint)
    invariants = run_invariants(distilled, NO_CACHE, model, student)
    # Its cache may have grown or be gone: an export does not need it.
    check_invariants(checkpoint, before.terms, {**invariants, "cache": before.terms.get("cache")})
    restore_networks(checkpoint, student)
    newest = [path.resolve() for path in whole_checkpoints(config.run)[-1:]]
    latest = checkpoint.resolve() in newest
    path = write_export(config, student.exported(), folder, before.step, latest)
    publish_export(config, folder, before.step, latest)
    return path


def wanted_checkpoint(config: ExportConfig) -> Path:
    """The checkpoint to export. Raises UserError where there is none."""
    try:
        folder = find_checkpoint(config.run, config.checkpoint)
    except UserError as error:  # which names the flag of `distill`
        raise UserError(str(error).replace("--resume-from-checkpoint", "--checkpoint")) from None
    if folder is None:
        raise UserError(f"{config.run} has no checkpoint yet")
    return folder
