"""What the flags of the scripts in data/ and benchmarks/ stand for."""

from __future__ import annotations

import argparse
from pathlib import Path

from shared.cli.paths import local_path
from shared.errors import UserError


def local_argument(text: str) -> Path:
    """Be `local_path` as argparse's `type`."""
    try:
        return local_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
