"""Archive to cache, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

from prep.archive.layout import SUFFIX, read_sums, refuse_strangers
from prep.archive.pack import copy_small, decompressed
from prep.cache.retire import retire
from prep.config import UnpackConfig
from shared.cache.identity import claim_identity, read_identity
from shared.cache.manifest import Manifest, open_manifest, parse_unit
from shared.cache.paths import CachePaths, refuse_full_disk
from shared.cache.units import Shard
from shared.cli.progress import Progress
from shared.errors import UserError
from shared.storage.files import file_sha256, guard, publish
from shared.storage.reading import read_file
from shared.storage.temporary import sweep
from shared.wording import counted


def unpack(config: UnpackConfig) -> None:
    """Restore the cache; what is already there and right is kept, so it can be run again.

    The manifest comes last: until then nobody takes the cache for complete. Raises UserError for a
    damaged archive, a full disk, or a cache in the way that is not this one.
    """
    archive, cache = config.input, CachePaths(config.cache)
    sums = read_sums(archive)
    check_small_files(archive, sums)
    manifest = open_manifest(archive, check_sizes=False)
    check_shards(archive, manifest, sums)
    records = {name.removeprefix("units/") for name in sums if name.startswith("units/")}
    refuse_strangers(cache.root, records, archive, "--cache")
    sweep(cache.tmp)
    wanted = [shard for shard in manifest.shards if not in_place(cache, shard)]
    sizes = [shard.size for shard in wanted]  # of a remote cache one lies here at a time
    local = isinstance(cache.root, Path)
    refuse_full_disk(cache, sum(sizes) if local else max(sizes, default=0))
    identity = read_identity(CachePaths(archive))
    assert identity is not None  # one of the small files
    claim_identity(cache, identity, "choose another --cache")
    with Progress("unpack", len(wanted), "shard") as progress:
        for shard in wanted:
            packed = archive / (shard.file + SUFFIX)
            publish(checked(packed, shard), cache.root / shard.file, cache.tmp)
            progress.update(1)
    retire(cache, {shard.file for shard in manifest.shards})
    for name in small_files(sums):
        copy_small(archive / name, cache.root / name, cache.tmp)
    kept = len(manifest.shards) - len(wanted)
    were = f" ({counted(kept, 'shard')} {'was' if kept == 1 else 'were'} there already)"
    print(
        f"{cache.root}: {counted(manifest.totals.written, 'sample')} in "
        f"{counted(len(manifest.shards), 'shard')}, every sha256 right{were if kept else ''}"
    )


def small_files(sums: dict[str, str]) -> list[str]:
    """All but the shards, units after what they name, the manifest last."""
    order = {"units": 1, "manifest.json": 2}
    names = [name for name in sums if not name.endswith(SUFFIX)]
    return sorted(names, key=lambda name: (order.get(name.partition("/")[0], 0), name))


def check_small_files(archive: Path, sums: dict[str, str]) -> None:
    """Raise UserError where a file is missing or one other than a shard has changed."""
    for name, digest in sums.items():
        if not (archive / name).is_file():
            raise UserError(f"{archive / name} is missing; copy the archive again")
        if not name.endswith(SUFFIX) and file_sha256(archive / name) != digest:
            raise damaged(archive / name)


def check_shards(archive: Path, manifest: Manifest, sums: dict[str, str]) -> None:
    """Raise UserError where manifest, records and archive do not name the same shards."""
    named = {
        shard.file: shard.sha256
        for name in sums
        if name.startswith("units/")
        for shard in parse_unit(read_file(archive / name), archive / name).shards
    }
    packed = {name.removesuffix(SUFFIX) for name in sums if name.endswith(SUFFIX)}
    if named != {s.file: s.sha256 for s in manifest.shards} or named.keys() != packed:
        raise UserError(f"{archive}: manifest, units and shards do not agree; pack it again")


def in_place(cache: CachePaths, shard: Shard) -> bool:
    """Is the shard there, byte for byte?"""
    path = cache.root / shard.file
    with guard(path.parent):
        there = path.is_file() and path.stat().st_size == shard.size
        return there and file_sha256(path) == shard.sha256


def checked(packed: Path, shard: Shard) -> Iterator[bytes]:
    """Yield the shard's bytes. Raises UserError before the end where others were recorded."""
    digest, count = hashlib.sha256(), 0
    try:
        for block in decompressed(packed):
            digest.update(block)
            count += len(block)
            if count > shard.size:  # never more than was promised, whatever it unpacks to
                break
            yield block
    except zstandard.ZstdError:
        raise damaged(packed) from None
    if count != shard.size or digest.hexdigest() != shard.sha256:
        raise damaged(packed)


def damaged(path: Path) -> UserError:
    """Make the error for a file that is not what was packed."""
    return UserError(f"{path} is damaged; copy it again, then run the same command")
