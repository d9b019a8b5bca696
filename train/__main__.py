"""`python -m train COMMAND`: the command line of stage two."""

from __future__ import annotations

import os
from dataclasses import replace

from shared.cli import startup  # noqa: F401 (before what takes a while)
from shared.cli.config import dispatch
from shared.errors import run_main
from train.config import DistillConfig, EvaluateConfig, ExportConfig, SampleConfig

# transformers' advice about torchvision is not for our users.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# The commands import what they need themselves, so that --help and mistakes answer at once.


def distill(config: DistillConfig) -> int:
    """Check, then train; the exit status."""
    from train.trainer import loop, setup
    from train.trainer.defaults import with_defaults

    config = with_defaults(config)
    if setup.print_if_finished(config):
        return 0
    run = setup.prepare(config)
    return 0 if config.dry_run else loop.distill(run)


def evaluate(config: EvaluateConfig) -> None:
    """Compare student and teacher."""
    from train.evaluation import evaluate
    from train.state.owner import owning
    from train.trainer.defaults import newest_student

    config = replace(config, run=newest_student(config.run))
    remedy = "wait for it, or give --output another folder"
    with owning(config.output or config.run, "train evaluate", remedy):
        evaluate.evaluate(config)


def sample(config: SampleConfig) -> None:
    """Draw prompts with a student."""
    from train.evaluation import sample_command
    from train.trainer.defaults import newest_student

    sample_command.draw_prompts(replace(config, run=newest_student(config.run)))


def export(config: ExportConfig) -> None:
    """Write a checkpoint's student."""
    from train.state.owner import owning
    from train.trainer.defaults import newest_checkpoint
    from train.trainer.export_command import export_checkpoint

    config = replace(config, run=newest_checkpoint(config.run))
    remedy = "wait for it, or give --output another folder"
    with owning(config.output or config.run, "train export", remedy):
        print(export_checkpoint(config))


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
