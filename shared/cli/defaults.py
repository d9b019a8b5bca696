"""What `make prep SHARDS=...` and `make train` mean where they do not say more."""

from __future__ import annotations

from pathlib import Path

from shared.storage.urls import Place

MODEL = "sdxl"
CACHES, RUNS = Path("caches"), Path("runs")


def default_cache(model: str) -> Place:
    """Return `caches/MODEL`, where both stages look unless told otherwise."""
    from shared.models.family import model_name  # slow to import, so only now

    return CACHES / model_name(model)
