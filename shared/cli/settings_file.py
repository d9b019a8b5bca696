"""`--config FILE`: settings in TOML or JSON, with the same names and checks as flags have."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from shared.cli.paths import local_path
from shared.errors import UsageError, UserError

LAUNCHER = {"compute_environment", "distributed_type"}  # what accelerate's file has
LAUNCHER_HINT = (
    "these are accelerate's settings: `accelerate launch --config_file FILE -m train distill ...` "
    "reads them; ours are in TOML or JSON"
)


def split_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    """Take `--config FILE` (or `--config=FILE`) out of the arguments."""
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag == "--config":
            if not equals and i + 1 == len(argv):
                raise UsageError("--config wants the path of a TOML or JSON file")
            end = i + 1 if equals else i + 2
            rest = argv[:i] + argv[end:]
            if split_config(rest)[0] is not None:
                raise UsageError("--config is given twice; put the settings into one file")
            try:
                return local_path(value if equals else argv[i + 1]), rest
            except UserError as error:
                raise UsageError(f"--config {error}") from None
    return None, argv


def read_settings(path: Path) -> dict[str, Any]:
    """Return the file's settings as they stand there, those that JSON says are null left out.

    Raises UsageError for a file that is missing, malformed, in sections or in YAML.
    """
    try:
        text = path.read_text("utf-8-sig")
        is_json = path.suffix.lower() == ".json"
        if path.suffix.lower() in (".yaml", ".yml"):
            raise ValueError(yaml_hint(text))
        stored: Any = json.loads(text) if is_json else tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or 'cannot be read'}") from None
    except (ValueError, RecursionError) as error:  # not of this kind, or not UTF-8
        raise UsageError(f"--config {path}: {error}") from None
    if not isinstance(stored, dict):
        raise UsageError(f"--config {path}: holds a {type(stored).__name__}, not names and values")
    if LAUNCHER & stored.keys():
        raise UsageError(f"--config {path}: {LAUNCHER_HINT}")
    for name, value in stored.items():
        inner = value if isinstance(value, list) else [value]
        if any(isinstance(one, dict) for one in inner):
            raise UsageError(f"--config {path}: {sections_hint(name)}")
    return {name: value for name, value in stored.items() if value is not None}


def yaml_hint(text: str) -> str:
    """Return what to do with a file in YAML."""
    if any(name in text for name in LAUNCHER):
        return LAUNCHER_HINT
    return "settings are in TOML (name = value) or JSON; rename the file once it is either"


def sections_hint(name: str) -> str:
    """Return what to do with a file in sections, as kohya's are."""
    known = {
        "datasets": "of kohya's data sets every subset's image_dir is one of `prep encode`'s "
        'shards = ["FOLDER", ...]',
        "general": "put kohya's [general] above, and of its data sets every subset's image_dir "
        'into shards = ["FOLDER", ...] of `prep encode`',
    }
    return f"[{name}] is a section, and settings stand here without; " + known.get(
        name, "take its line away, and give each stage of the work its own file"
    )
