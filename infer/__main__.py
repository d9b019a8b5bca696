"""`python -m infer COMMAND`: the command line of what comes after training."""

from __future__ import annotations

from shared.cli import startup  # isort: skip  # noqa: F401 (before what takes a while)

from infer.config import CompareConfig, DrawConfig, LearnConfig, MergeConfig, MorphConfig
from shared.cli.config import command, dispatch
from shared.errors import run_main

COMMANDS = {
    "compare": (CompareConfig, command("infer.compare.command", "compare")),
    "draw": (DrawConfig, command("infer.draw.command", "draw")),
    "learn": (LearnConfig, command("infer.learn.command", "learn")),
    "merge": (MergeConfig, command("infer.merge.command", "merge")),
    "morph": (MorphConfig, command("infer.morph.command", "morph")),
}
LESS_MEMORY = (
    "draw needs less of it with --dtype float16 or a smaller --size, learn and morph with a "
    "smaller --train-batch-size or --gradient-checkpointing"
)
INTERRUPTED = "every file that was written is whole"


def main() -> None:
    """Entry point of `distillery-infer`."""
    run_main(lambda: dispatch("python -m infer", COMMANDS), LESS_MEMORY, INTERRUPTED)


if __name__ == "__main__":
    main()
