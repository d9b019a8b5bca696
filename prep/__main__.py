"""`python -m prep COMMAND`: the command line of stage one."""

from __future__ import annotations

from shared.cli import startup  # isort: skip  # noqa: F401 (before what takes a while)

from prep import config
from prep.synthesize.config import SynthesizeConfig
from shared.cli.config import command, dispatch
from shared.errors import run_main

COMMANDS = {
    "encode": (config.EncodeConfig, command("prep.commands", "encode")),
    "synthesize": (SynthesizeConfig, command("prep.synthesize_command", "synthesize")),
    "teach": (config.TeachConfig, command("prep.teach.command", "teach")),
    "finish": (config.FinishConfig, command("prep.commands", "finish")),
    "embed": (config.EmbedConfig, command("prep.encode.prompts", "embed")),
    "verify": (config.VerifyConfig, command("prep.inspect.verify", "verify")),
    "decode": (config.DecodeConfig, command("prep.inspect.contact_sheet", "decode")),
    "stats": (config.StatsConfig, command("prep.inspect.stats", "stats")),
    "report": (config.ReportConfig, command("prep.inspect.report", "report")),
    "gc": (config.GcConfig, command("prep.cache.gc", "gc")),
    "pack": (config.PackConfig, command("prep.archive.pack", "pack")),
    "unpack": (config.UnpackConfig, command("prep.archive.unpack", "unpack")),
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
