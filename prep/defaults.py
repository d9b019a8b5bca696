"""What `prep encode` does where its flags do not say."""

from __future__ import annotations

import sys
from dataclasses import replace

from prep.config import EncodeConfig
from shared.cli.defaults import default_cache


def with_cache(config: EncodeConfig) -> EncodeConfig:
    """The same with a cache named after its model, which the first line says."""
    if config.cache is not None:
        return config
    config = replace(config, cache=default_cache(config.model))
    print(
        f"model {config.model}, cache {config.cache} (--model and --cache choose others)",
        file=sys.stderr,
    )
    return config
