"""`python -m train COMMAND`: the command line of stage two."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from shared.cli import startup  # noqa: F401 (before what takes a while)
from shared.cli.config import dispatch
from shared.errors import run_main
from train.config import DistillConfig, EvaluateConfig, ExportConfig, SampleConfig

# transformers' advice about torchvision is not for our users.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def command(module: str, name: str) -> Callable[[Any], int | None]:
    """A command that is imported when it runs, so that --help and mistakes answer at once."""

    def run(config: Any) -> int | None:
        status: int | None = getattr(import_module(f"train.{module}"), name)(config)
        return status

    return run


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int | None]]] = {
    "distill": (DistillConfig, command("trainer.distill_command", "distill")),
    "evaluate": (EvaluateConfig, command("evaluation.evaluate", "evaluate")),
    "sample": (SampleConfig, command("evaluation.sample_command", "draw_prompts")),
    "export": (ExportConfig, command("trainer.export_command", "export")),
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
