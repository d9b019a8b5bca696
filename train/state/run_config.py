"""A run's config.json, read back as the dataclass that it was written from."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.cli.config import coerce, fits
from shared.cli.ranges import check_numbers
from shared.errors import UserError
from shared.storage.files import load_record
from shared.storage.typed_json import NewerRecord
from train.config import DistillConfig, RunConfig
from train.state.run_paths import from_here


def run_config(run: Path) -> RunConfig:
    """Read the flags of the run at `run`, with paths as they lead from here.

    Raises UserError where the folder is no run, or damaged.
    """
    if not (run / "config.json").exists():
        raise UserError(f"{run} is no run (no config.json); `train distill --run {run}` makes one")
    return from_here(stored_config(run / "config.json"), run)


def stored_config(path: Path) -> RunConfig:
    """Read the flags of a run as they were typed; those that are younger have their defaults.

    Raises UserError where the file is missing, damaged or of a newer version.
    """
    return load_record(path, _build, "restore it, or train again with another --run")


def _build(stored: Mapping[str, Any]) -> RunConfig:
    hints = typing.get_type_hints(RunConfig) | typing.get_type_hints(DistillConfig)
    shown = {field.name for field in dataclasses.fields(RunConfig) if field.repr}
    if unknown := sorted(stored.keys() - shown):
        raise NewerRecord(f"it has the flag {unknown[0]!r:.60}, which is unknown here")
    for name, value in stored.items():
        if not fits(value, hints[name]):
            raise ValueError(f"{name} is {value!r:.60}")
    if missing := [name for name in ("cache", "model", "run") if not stored.get(name)]:
        raise ValueError(f"it has no {', '.join(missing)}")
    try:
        config = RunConfig(**coerce(RunConfig, stored))
        check_numbers(config)
    except UserError as error:
        raise ValueError(str(error)) from None
    return config
