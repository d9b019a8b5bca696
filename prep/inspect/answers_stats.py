"""What a cache has of its teacher, for `prep stats`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.cache.answers_store import open_answers
from shared.cache.manifest import Manifest
from shared.cache.paths import CachePaths
from shared.sanitize import visible
from shared.wording import counted, size_of


def answers_summary(cache: CachePaths, manifest: Manifest | None) -> dict[str, Any] | None:
    """Say what the cache has of its teacher, None for nothing. Raises UserError for damage."""
    found = open_answers(cache.root, check_sizes=False)
    if found is None:
        return None
    shards = {shard.file for shard in manifest.shards} if manifest else set()
    return {
        "answers": found.answers,
        "model": found.identity.model,
        "num_ddim_timesteps": found.identity.num_ddim_timesteps,
        "trajectory": found.identity.trajectory,
        "command": found.identity.command,
        "without": found.without,
        "retried": found.retried,
        "bytes": sum(shard.size for shard in found.shards),
        "complete": shards == {shard.samples for shard in found.shards},
    }


def answers_line(answers: Mapping[str, Any]) -> str:
    """`4 of each sample by MODEL at 50 timesteps, 1.2 GB`, and what is missing."""
    line = (
        f"{answers['answers']} of each sample by {visible(answers['model'], 60)} at "
        f"{answers['num_ddim_timesteps']} timesteps, "
        f"{'kept while drawing, ' if answers['trajectory'] else ''}{size_of(answers['bytes'])}"
    )
    if answers["without"]:
        line += f"; {counted(answers['without'], 'sample')} without"
    if answers["complete"]:
        return line
    return f"{line}; of another state: run the same `{answers['command']}`"
