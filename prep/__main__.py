"""`python -m prep COMMAND`: the command line of stage one."""

from __future__ import annotations

import os

from shared.cli import startup  # isort: skip  # noqa: F401 (before what takes a while)

from prep.config import (
    DecodeConfig,
    EmbedConfig,
    EncodeConfig,
    FinishConfig,
    GcConfig,
    PackConfig,
    ReportConfig,
    StatsConfig,
    UnpackConfig,
    VerifyConfig,
)
from shared.cli.config import command, dispatch
from shared.errors import run_main

# transformers' advice about torchvision and its loading bars are not for our users.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

COMMANDS = {
    "encode": (EncodeConfig, command("prep.commands", "encode")),
    "finish": (FinishConfig, command("prep.commands", "finish")),
    "embed": (EmbedConfig, command("prep.encode.prompts", "embed")),
    "verify": (VerifyConfig, command("prep.inspect.verify", "verify")),
    "decode": (DecodeConfig, command("prep.inspect.contact_sheet", "decode")),
    "stats": (StatsConfig, command("prep.inspect.stats", "stats")),
    "report": (ReportConfig, command("prep.inspect.report", "report")),
    "gc": (GcConfig, command("prep.inspect.gc", "gc")),
    "pack": (PackConfig, command("prep.archive.pack", "pack")),
    "unpack": (UnpackConfig, command("prep.archive.unpack", "unpack")),
}
LESS_MEMORY = (
    "encode needs less of it with a smaller --vae-batch-size or --text-batch-size (of a new cache: "
    "one that is begun keeps its own)"
)


def main() -> None:
    """Entry point of `distillery-prep`."""
    run_main(lambda: dispatch("python -m prep", COMMANDS), LESS_MEMORY)


if __name__ == "__main__":
    main()
