"""`infer draw`: prompts become pictures."""

from __future__ import annotations

from infer.config import DrawConfig


def draw(config: DrawConfig) -> None:
    """Draw what the flags say."""
    raise NotImplementedError
