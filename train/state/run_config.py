"""A run's config.json, read back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.cli.config import coerce, fits, to_dict
from shared.cli.ranges import check_numbers
from shared.errors import UserError
from shared.storage.files import load_record
from shared.storage.typed_json import NewerRecord
from train.config import DistillConfig


def stored_config(path: Path) -> dict[str, Any]:
    """The resolved flags of a run; those that are younger than it have their defaults.

    Raises UserError where the file is missing, damaged or of a newer version.
    """
    return load_record(path, _flags, "restore it, or train again with another --run")


def _flags(stored: Mapping[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(DistillConfig)
    shown = {field.name for field in dataclasses.fields(DistillConfig) if field.repr}
    if unknown := sorted(stored.keys() - shown):
        raise NewerRecord(f"it has the flag {unknown[0]!r:.60}, which is unknown here")
    for name, value in stored.items():
        if not fits(value, hints[name]):
            raise ValueError(f"{name} is {value!r:.60}")
    if missing := [name for name in ("cache", "model", "run") if not stored.get(name)]:
        raise ValueError(f"it has no {', '.join(missing)}")
    try:
        whole = DistillConfig(**coerce(DistillConfig, stored))
        check_numbers(whole)
    except UserError as error:
        raise ValueError(str(error)) from None
    return {**to_dict(whole), **stored}
