"""Does a cache hold what its records say?"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prep.cache.holdout import set_aside
from prep.cache.retire import retire
from prep.config import VerifyConfig
from prep.inspect.reencode import disagreements
from prep.inspect.verify_answers import damages_of_answers, other_answers
from shared.cache.answers_store import answers_of, read_answers_identity
from shared.cache.conditioning import load_conditioning
from shared.cache.identity import read_identity
from shared.cache.manifest import Manifest, fold, open_manifest, parse_unit, unit_files
from shared.cache.paths import CachePaths
from shared.cache.units import Shard, UnitRecord
from shared.cli.progress import Progress
from shared.errors import UserError
from shared.storage.files import NewerVersion, file_sha256, guard, sync_folder
from shared.storage.reading import NotAFile, read_file
from shared.storage.urls import Place
from shared.wording import counted

CHANGED = "is not the file that was committed (sha256 differs)"


def verify(config: VerifyConfig) -> int:
    """Print every damage found; the exit status is 1 if there is any.

    With `repair`, the records of damaged units are removed, so that `prep encode` makes these
    units again.
    """
    cache = CachePaths(config.cache)
    manifest = open_manifest(config.cache, check_sizes=False)
    damaged: dict[Place, int] = {}  # a file that is to go, and how many damages say so
    units: list[UnitRecord] = []
    with Progress("verify", manifest.totals.written, "sample") as progress:

        def note(path: Place, damage: str) -> None:
            damaged[path] = damaged.get(path, 0) + 1
            progress.write(f"damaged: {damage}")

        for path in unit_files(cache):
            unit = read_record(path)
            if isinstance(unit, str):
                note(path, unit)
                continue
            units.append(unit)
            for damage in damages_of_unit(cache, unit, progress):
                note(path, damage)
        for damage in damages_of_conditioning(cache, manifest):
            note(cache.conditioning, damage)
        for path, damage in damages_of_answers(cache, manifest):
            note(path, damage)
        if config.reencode and (drawn := manifest.identity.drawn):
            progress.write(f"nothing encoded again: {drawn}, there are no pictures to compare with")
        elif config.reencode and not damaged:
            for name, damage in disagreements(config, manifest, progress):
                note(cache.units / f"{name}.json", damage)
        if config.reencode and not damaged and (identity := read_answers_identity(cache)):
            for path, damage in other_answers(config, manifest, identity, progress):
                note(path, damage)
    stale = damage_of_manifest(cache, manifest, units)
    if stale and not damaged:
        print(f"damaged: {stale}", file=sys.stderr)
    count = sum(damaged.values()) + bool(stale)
    verdict = counted(count, "damage") if count else "no damage"
    print(f"{config.cache}: {counted(manifest.totals.written, 'sample')} checked, {verdict}")
    if damaged:
        command = manifest.identity.command
        mended = repair(cache, list(damaged), command) if config.repair else ""
        print(mended or remedy(config, manifest, damaged))
    return 1 if count else 0


def remedy(config: VerifyConfig, manifest: Manifest, damaged: Collection[Place]) -> str:
    """Say what to do about damage."""
    made = manifest.identity
    again = f"`{made.command}` that made the cache (model {made.model})"
    cache = CachePaths(config.cache)
    if only_answers(cache, damaged):
        again = f"same `{maker_of_answers(cache)}`"
    return f"to mend it: `python -m prep verify --cache {config.cache} --repair`, then the {again}"


def only_answers(cache: CachePaths, damaged: Collection[Place]) -> bool:
    """Is all that is damaged among the answers?"""
    return all(path.parent == answers_of(cache).units for path in damaged)


def maker_of_answers(cache: CachePaths) -> str:
    """Name the command that makes a cache's answers."""
    identity = read_answers_identity(cache)
    return identity.command if identity else "prep teach"


def repair(cache: CachePaths, damaged: list[Place], command: str) -> str:
    """Remove these files, mostly units' records, and the manifest; returns what to do next.

    Without its record a unit is encoded anew, its damaged files are replaced then or left to
    `prep gc`; and without its manifest nobody trains on the cache. The manifest goes last: were it
    first, a crash would leave the damaged units to be folded into a new one.
    """
    answers = answers_of(cache)
    with guard(cache.root):
        for path in damaged:
            path.unlink(missing_ok=True)
        if any(path.parent == answers.units for path in damaged):
            sync_folder(answers.units)
            answers.manifest.unlink(missing_ok=True)
            sync_folder(answers.root)
    if only_answers(cache, damaged):
        return (
            f"{counted(len(damaged), 'record')} of answers removed; run the same "
            f"`{maker_of_answers(cache)}` to have these again"
        )
    with guard(cache.root):
        if cache.units.is_dir():
            sync_folder(cache.units)
        retire(cache, ())
        cache.manifest.unlink(missing_ok=True)
        sync_folder(cache.root)
    units = sum(path.parent == cache.units for path in damaged)
    return (
        f"{counted(units, 'unit record')} removed; run the same `{command}` to make these units "
        "again, or `prep finish` to go on without them"
    )


def read_record(path: Place) -> UnitRecord | str:
    """Read a unit's record, or say what is wrong where the file holds none.

    Raises UserError where it cannot be read, or a newer version wrote it: it may be right.
    """
    content = read_file(path)
    try:
        return parse_unit(content, path)
    except NewerVersion:
        raise
    except UserError as error:
        return f"units/{path.name} is not a unit's record: {error}"


def damage_of_manifest(cache: CachePaths, manifest: Manifest, units: list[UnitRecord]) -> str:
    """Where the manifest is not what identity and records add up to, or an empty string."""
    files = [shard.file for unit in units for shard in unit.shards]
    if files != [shard.file for shard in manifest.shards]:
        return (
            "manifest.json and the units do not name the same shards; run the same "
            f"`{manifest.identity.command}`, or `prep finish` to take the units as they are"
        )
    stored = manifest.to_json()
    identity = read_identity(cache)
    if identity is None:
        return "identity.json is missing; restore it, or encode anew"
    added = fold(identity, units, manifest.versions)
    folded = set_aside(cache, added).to_json()
    differing = [name for name in folded if stored.get(name) != folded[name]]
    if not differing:
        return ""
    return (
        f"manifest.json: its {', '.join(differing)} are not what identity.json and the units "
        "add up to; run `prep finish`, which writes it anew"
    )


def damages_of_conditioning(cache: CachePaths, manifest: Manifest) -> Iterator[str]:
    """Yield a line where the embeddings of prompts are missing, damaged or not finite."""
    try:
        stored = load_conditioning(cache.conditioning, manifest.layouts)
    except UserError:
        yield f"{cache.conditioning.name} is missing or damaged"
        return
    for embeds in (stored.unconditional, stored.embeds):
        both = (embeds.prompt_embeds, embeds.pooled_prompt_embeds)
        if not all(one.isfinite().all() for one in both if one is not None):
            yield f"{cache.conditioning.name} has non-finite values"


def damages_of_unit(cache: CachePaths, unit: UnitRecord, progress: Progress) -> Iterator[str]:
    """Yield a line for each file or sample of the unit that is not what its record says."""
    if sha256_of(cache.root / unit.samples) != unit.samples_sha256:
        yield f"{unit.samples} is missing or changed"
    for shard in unit.shards:
        path = cache.root / shard.file
        found = sha256_of(path)
        if found != shard.sha256:
            yield f"{shard.file} {found if ' ' in found else CHANGED}"
        if " " not in found:
            yield from damages_of_shard(path, shard)
        progress.update(shard.count)


def sha256_of(path: Place) -> str:
    """Compute the sha256 of a file, or say in words what is there instead of one."""
    try:
        return file_sha256(path)
    except FileNotFoundError:
        return "is missing"
    except NotAFile:
        return "is a folder or a pipe, no file"


def damages_of_shard(path: Place, shard: Shard) -> Iterator[str]:
    """Yield a line for each sample whose bytes, checksum or values are wrong."""
    try:
        layout = shard.layout
    except (ValueError, KeyError, TypeError) as error:
        yield f"{shard.file}: its record has no valid layout ({error})"
        return
    with path.open("rb") as file:
        for index in range(shard.count):
            sample = f"{shard.file} sample {index}"
            try:
                key, record, arrays = layout.unpack(file.read(layout.stride))
            except ValueError as error:
                yield f"{sample}: {error}"
                continue
            if layout.crc32(arrays) != record.get("crc32"):
                yield f"{sample} ({key}): checksum differs"
            if not all(np.isfinite(array).all() for array in arrays.values()):
                yield f"{sample} ({key}): non-finite values"
            elif name := next((name for name in arrays if is_constant(name, arrays[name])), ""):
                yield f"{sample} ({key}): {name} of one value alone"


def is_constant(name: str, array: NDArray[Any]) -> bool:
    """Has a view's mean, or a caption, one value alone, as zeros have? time_ids may.

    The first half of a view's channels is all mean: behind it there may be a logvar.
    """
    if name == "time_ids":
        return False
    half = array[:, : array.shape[1] // 2] if name == "latents" else array
    rows = half.reshape(len(array), -1)
    return bool((rows == rows[:, :1]).all(1).any()) and rows.shape[1] > 1
