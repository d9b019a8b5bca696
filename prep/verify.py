"""Does a cache hold what its records say?"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import numpy as np

from prep.config import VerifyConfig
from prep.gc import retire
from prep.holdout import set_aside
from prep.reencode import disagreements
from shared.cache import CachePaths, Manifest, Shard, UnitRecord, fold, open_manifest, unit_files
from shared.conditioning import load_conditioning
from shared.errors import UserError
from shared.layout import Layout
from shared.places import Place
from shared.progress import Progress
from shared.storage import file_sha256, guard, load_json, sync_folder
from shared.wording import counted


def verify(config: VerifyConfig) -> int:
    """Print every damage found; the exit status is 1 if there is any.

    With `repair`, the records of damaged units are removed, so that `prep encode` makes these
    units again.
    """
    cache = CachePaths(config.cache)
    manifest = open_manifest(config.cache, check_sizes=False)
    damaged: dict[Place, int] = {}  # a file that is to go, and how many damages say so
    units: list[UnitRecord] = []
    with Progress("verify", manifest.totals["written"], "sample") as progress:

        def note(path: Place, damage: str) -> None:
            damaged[path] = damaged.get(path, 0) + 1
            progress.write(f"damaged: {damage}")

        for path in unit_files(cache):
            unit = read_record(path)
            if unit is None:
                note(path, f"units/{path.name} is not a unit's record")
                continue
            units.append(unit)
            for damage in damages_of_unit(cache, unit, progress):
                note(path, damage)
        for damage in damages_of_conditioning(cache):
            note(cache.conditioning, damage)
        if config.reencode and not damaged:
            for name, damage in disagreements(config, manifest, progress):
                note(cache.units / f"{name}.json", damage)
    stale = damage_of_manifest(cache, manifest, units)
    if stale and not damaged:
        print(f"damaged: {stale}", file=sys.stderr)
    count = sum(damaged.values()) + bool(stale)
    verdict = counted(count, "damage") if count else "no damage"
    print(f"{config.cache}: {counted(manifest.totals['written'], 'sample')} checked, {verdict}")
    if damaged:
        print(repair(cache, list(damaged)) if config.repair else remedy(config, manifest))
    return 1 if count else 0


def remedy(config: VerifyConfig, manifest: Manifest) -> str:
    """What to do about damage."""
    return (
        f"to mend it: `python -m prep verify --cache {config.cache} --repair`, then the "
        f"`prep encode` that made the cache (model {manifest.identity['model']})"
    )


def repair(cache: CachePaths, damaged: list[Place]) -> str:
    """Remove these files, mostly units' records, and the manifest; returns what to do next.

    Without its record a unit is encoded anew, its damaged files are replaced then or left to
    `prep gc`; and without its manifest nobody trains on the cache. The manifest goes last: were it
    first, a crash would leave the damaged units to be folded into a new one.
    """
    with guard(cache.root):
        for path in damaged:
            path.unlink(missing_ok=True)
        if cache.units.is_dir():
            sync_folder(cache.units)
        retire(cache, ())
        cache.manifest.unlink(missing_ok=True)
        sync_folder(cache.root)
    units = sum(path.parent == cache.units for path in damaged)
    return (
        f"{counted(units, 'unit record')} removed; run the same `prep encode` to make these units "
        "again, or `prep finish` to go on without them"
    )


def read_record(path: Place) -> UnitRecord | None:
    """A unit's record, or None where the file holds none."""
    with contextlib.suppress(UserError, TypeError, KeyError, AttributeError, AssertionError):
        return UnitRecord.from_json(load_json(path))
    return None


def damage_of_manifest(cache: CachePaths, manifest: Manifest, units: list[UnitRecord]) -> str:
    """Where the manifest is not what identity and records add up to, or an empty string."""
    files = [shard.file for unit in units for shard in unit.shards]
    if files != [shard.file for shard in manifest.shards]:
        return (
            "manifest.json and the units do not name the same shards; run the same "
            "`prep encode`, or `prep finish` to take the units as they are"
        )
    stored = manifest.to_json()
    added = fold(load_json(cache.identity), units, manifest.versions)
    folded = set_aside(cache, added).to_json()
    differing = [name for name in folded if stored.get(name) != folded[name]]
    if not differing:
        return ""
    return (
        f"manifest.json: its {', '.join(differing)} are not what identity.json and the units "
        "add up to; run `prep finish`, which writes it anew"
    )


def damages_of_conditioning(cache: CachePaths) -> Iterator[str]:
    """A line where the embeddings of prompts are missing, damaged or not finite."""
    try:
        stored = load_conditioning(cache.conditioning)
    except UserError:
        yield f"{cache.conditioning.name} is missing or damaged"
        return
    for embeds in (stored.unconditional, stored.embeds):
        pooled = embeds.pooled_prompt_embeds
        if not embeds.prompt_embeds.isfinite().all() or not (
            pooled is None or pooled.isfinite().all()
        ):
            yield f"{cache.conditioning.name} has non-finite values"


def damages_of_unit(cache: CachePaths, unit: UnitRecord, progress: Progress) -> Iterator[str]:
    """A line for each file or sample of the unit that is not what its record says."""
    samples = cache.root / unit.samples
    if not samples.exists() or file_sha256(samples) != unit.samples_sha256:
        yield f"{unit.samples} is missing or changed"
    for shard in unit.shards:
        path = cache.root / shard.file
        if not path.exists():
            yield f"{shard.file} is missing"
            continue
        if file_sha256(path) != shard.sha256:
            yield f"{shard.file} is not the file that was committed (sha256 differs)"
        yield from damages_of_shard(path, shard)
        progress.update(shard.count)


def damages_of_shard(path: Place, shard: Shard) -> Iterator[str]:
    """A line for each sample whose bytes, checksum or values are wrong."""
    try:
        layout = Layout.from_json(shard.layout)
    except (ValueError, KeyError, TypeError) as error:
        yield f"{shard.file}: its record has no valid layout ({error})"
        return
    for index, sample in enumerate(read_samples(path, layout, shard.count)):
        try:
            key, record, arrays = layout.unpack(sample)
        except ValueError as error:
            yield f"{shard.file} sample {index}: {error}"
            continue
        if layout.crc32(arrays) != record.get("crc32"):
            yield f"{shard.file} sample {index} ({key}): checksum differs"
        if not all(np.isfinite(array).all() for array in arrays.values()):
            yield f"{shard.file} sample {index} ({key}): non-finite values"


def read_samples(path: Place, layout: Layout, count: int) -> Iterator[bytes]:
    """Each sample's bytes."""
    with path.open("rb") as file:
        for _ in range(count):
            yield file.read(layout.stride)
