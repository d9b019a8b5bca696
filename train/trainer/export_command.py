"""`train export`: a checkpoint of a run becomes a student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shared.errors import UserError
from shared.models.family import resolve_model
from shared.storage.files import guard
from train.config import ExportConfig
from train.export.hub import check_push
from train.export.newest_run import newest_checkpoint
from train.export.provenance import of_recorded
from train.export.standalone import check_standalone, note_range, standalone_folder
from train.export.student import publish_export, write_export
from train.networks.build import build_student
from train.state.checkpoint import find_checkpoint, latest_checkpoint, read_progress
from train.state.owner import owning
from train.state.restore import restore_networks
from train.state.resume_checks import check_invariants, run_invariants
from train.state.run_config import run_config


def export(config: ExportConfig) -> None:
    """Export a checkpoint of a run as the run's owner, and print where."""
    run = newest_checkpoint(config.run)
    check_output(config, run)
    remedy = "wait for it, or give --output another folder"
    with owning(folder_of(config, run), "train export", remedy):
        print(export_checkpoint(run, config))


def folder_of(config: ExportConfig, run: Path) -> Path:
    """Where the export goes."""
    if config.output is not None:
        return config.output
    return standalone_folder(run, config.guidance_scale) if stands_alone(config) else run


def check_output(config: ExportConfig, run: Path) -> None:
    """Raise UserError where an export would put another student in the place of what is there."""
    if config.output is None:
        return
    other = stands_alone(config) or config.output.resolve() != run.resolve()
    if other and (config.output / "checkpoints").is_dir():
        raise UserError(
            f"--output {config.output} is a run, whose own student would be replaced; leave it "
            "out, or give another folder"
        )
    if (config.output / "model_index.json").exists():
        raise UserError(
            f"--output {config.output} is a whole model, whose UNet would be replaced; give "
            "another folder"
        )


def stands_alone(config: ExportConfig) -> bool:
    """Is a model of its own asked for?"""
    return config.standalone or config.guidance_scale is not None


def export_checkpoint(run: Path, config: ExportConfig) -> Path:
    """Write a checkpoint's student, with its card; publish it if asked to. Return its path.

    Raises UserError where there is none, where it is of another run, or where the hub refuses.
    """
    check_push(config, run)
    stored = run_config(run)
    check_standalone(config, stored)
    checkpoint = find_checkpoint(run, config.checkpoint, "--checkpoint")
    if checkpoint is None:
        raise UserError(f"{run} has no checkpoint yet")
    folder = folder_of(config, run)
    with guard(folder):
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
    before = read_progress(checkpoint)
    origin = replace(
        of_recorded(stored, config.model, before.step),
        standalone=stands_alone(config),
        guidance_scale=config.guidance_scale,
    )
    note_range(origin)
    model = resolve_model(origin.teacher)
    student = build_student(model.source, stored)
    invariants = run_invariants(stored, None, model, student)
    # Its cache may have grown or be gone: an export does not need it.
    cache = before.terms.get("cache")
    check_invariants(checkpoint, before.terms, {**invariants, "cache": cache})
    restore_networks(checkpoint, student)
    newest = latest_checkpoint(run)
    latest = newest is not None and checkpoint.resolve() == newest.resolve()
    path = write_export(run, origin, student.exported(), folder, config.export_dtype, latest)
    publish_export(run, origin, folder, config, latest)
    return path
