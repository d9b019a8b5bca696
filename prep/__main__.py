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
from shared.cli.config import dispatch
from shared.errors import run_main

# transformers' advice about torchvision and its loading bars are not for our users.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# The commands import what they need themselves, so that --help and mistakes answer at once.


def encode(config: EncodeConfig) -> None:
    """Sources to cache."""
    from prep import commands
    from prep.defaults import with_cache

    commands.encode(with_cache(config))


def finish(config: FinishConfig) -> None:
    """Fold the committed units into the manifest."""
    from prep import commands

    commands.finish(config)


def embed(config: EmbedConfig) -> None:
    """Add prompts to a cache."""
    from prep.encode.prompts import embed

    embed(config)


def verify(config: VerifyConfig) -> int:
    """Check a cache."""
    from prep.inspect.verify import verify

    return verify(config)


def decode(config: DecodeConfig) -> None:
    """Draw a contact sheet."""
    from prep.inspect.contact_sheet import decode

    decode(config)


def stats(config: StatsConfig) -> None:
    """Print what is in a cache."""
    from prep.inspect.stats import stats

    stats(config)


def report(config: ReportConfig) -> None:
    """Write the page about a cache."""
    from prep.inspect.report import report

    report(config)


def gc(config: GcConfig) -> None:
    """Remove what no record names."""
    from prep.inspect.gc import gc

    gc(config)


def pack(config: PackConfig) -> None:
    """Cache to archive."""
    from prep.archive.pack import pack

    pack(config)


def unpack(config: UnpackConfig) -> None:
    """Archive to cache."""
    from prep.archive.unpack import unpack

    unpack(config)


COMMANDS = {
    "encode": (EncodeConfig, encode),
    "finish": (FinishConfig, finish),
    "embed": (EmbedConfig, embed),
    "verify": (VerifyConfig, verify),
    "decode": (DecodeConfig, decode),
    "stats": (StatsConfig, stats),
    "report": (ReportConfig, report),
    "gc": (GcConfig, gc),
    "pack": (PackConfig, pack),
    "unpack": (UnpackConfig, unpack),
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
