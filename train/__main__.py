"""`python -m train COMMAND`: the command line of stage two."""

from __future__ import annotations

import os
from dataclasses import replace

from shared.config import dispatch
from shared.errors import run_main
from train.config import DistillConfig, EvaluateConfig, ExportConfig, SampleConfig

# transformers' advice about torchvision is not for our users.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# The commands import what they need themselves, so that --help and mistakes answer at once.


def distill(config: DistillConfig) -> None:
    """Check, then train."""
    from train import loop, setup
    from train.defaults import with_defaults

    config = with_defaults(config)
    run = setup.prepare(config)
    if not config.dry_run:
        loop.distill(run)


def evaluate(config: EvaluateConfig) -> None:
    """Compare student and teacher."""
    from train import evaluate
    from train.defaults import newest_student

    evaluate.evaluate(replace(config, run=newest_student(config.run)))


def sample(config: SampleConfig) -> None:
    """Draw prompts with a student."""
    from train import draw
    from train.defaults import newest_student

    draw.draw_prompts(replace(config, run=newest_student(config.run)))


def export(config: ExportConfig) -> None:
    """Write a checkpoint's student."""
    from train.defaults import newest_checkpoint
    from train.export import export_checkpoint

    print(export_checkpoint(replace(config, run=newest_checkpoint(config.run))))


COMMANDS = {
    "distill": (DistillConfig, distill),
    "evaluate": (EvaluateConfig, evaluate),
    "sample": (SampleConfig, sample),
    "export": (ExportConfig, export),
}


LESS_MEMORY = (
    "distill needs less of it with --mixed-precision bf16, --gradient-checkpointing or a smaller "
    "--train-batch-size (docs/memory.md), evaluate with a smaller --batch-size, sample with fewer "
    "--num-images"
)


def main() -> None:
    """Entry point of `distillery-train`."""
    run_main(lambda: dispatch("python -m train", COMMANDS), LESS_MEMORY)


if __name__ == "__main__":
    main()
