"""`train distill`: check, then train."""

from __future__ import annotations

import os

from train.config import DistillConfig
from train.trainer.defaults import with_defaults
from train.trainer.loop import distill as train
from train.trainer.resume import finished_message
from train.trainer.setup import prepare


def distill(flags: DistillConfig) -> int:
    """Check, then train, unless this very command has done so; the exit status."""
    config = with_defaults(flags)
    if finished := finished_message(config):
        if os.environ.get("RANK", "0") == "0":
            print(finished)
        return 0
    run = prepare(config)
    return 0 if config.dry_run else train(run)
