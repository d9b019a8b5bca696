"""`python -m prep COMMAND`: the command line of stage one."""

from __future__ import annotations

import os

from prep.config import DecodeConfig, EmbedConfig, EncodeConfig, FinishConfig, VerifyConfig
from shared.config import dispatch
from shared.errors import run_main

# transformers' advice about torchvision and its loading bars are not for our users.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# The commands import what they need themselves, so that --help and mistakes answer at once.


def encode(config: EncodeConfig) -> None:
    """Sources to cache."""
    from prep import commands

    commands.encode(config)


def finish(config: FinishConfig) -> None:
    """Fold the committed units into the manifest."""
    from prep import commands

    commands.finish(config)


def embed(config: EmbedConfig) -> None:
    """Add prompts to a cache."""
    from prep import commands

    commands.embed(config)


def verify(config: VerifyConfig) -> int:
    """Check a cache."""
    from prep import audit

    return audit.verify(config)


def decode(config: DecodeConfig) -> None:
    """Draw a contact sheet."""
    from prep import audit

    audit.decode(config)


COMMANDS = {
    "encode": (EncodeConfig, encode),
    "finish": (FinishConfig, finish),
    "embed": (EmbedConfig, embed),
    "verify": (VerifyConfig, verify),
    "decode": (DecodeConfig, decode),
}


def main() -> None:
    """Entry point of `distillery-prep`."""
    run_main(lambda: dispatch("python -m prep", COMMANDS))


if __name__ == "__main__":
    main()
