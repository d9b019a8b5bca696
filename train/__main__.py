"""`python -m train COMMAND`: the command line of stage two."""

from __future__ import annotations

from shared.cli import startup  # noqa: F401 (before what takes a while)
from shared.cli.config import command, dispatch
from shared.errors import run_main
from train.config import CompareConfig, DistillConfig, EvaluateConfig, ExportConfig, SampleConfig

COMMANDS = {
    "distill": (DistillConfig, command("train.trainer.distill_command", "distill")),
    "evaluate": (EvaluateConfig, command("train.evaluation.evaluate", "evaluate")),
    "compare": (CompareConfig, command("train.comparison.compare", "compare")),
    "sample": (SampleConfig, command("train.evaluation.sample_command", "draw_prompts")),
    "export": (ExportConfig, command("train.trainer.export_command", "export")),
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
