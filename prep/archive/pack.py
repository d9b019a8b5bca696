"""Cache to archive: for shipping, since fp16 tensors lose only a tenth or so of their bytes."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import zstandard

from prep.archive.layout import SUFFIX, SUMS, refuse_names, refuse_strangers, write_sums
from prep.config import PackConfig
from shared.cache.manifest import open_manifest, read_units
from shared.cache.paths import CachePaths
from shared.cache.units import Shard
from shared.cli.progress import Progress
from shared.errors import UserError
from shared.machine import cpus
from shared.storage.files import copy_durably, file_sha256, free_bytes, guard, publish, sync_folder
from shared.storage.temporary import sweep
from shared.storage.urls import Place
from shared.wording import counted, percent, size_of

BLOCK = 1 << 20


def pack(config: PackConfig) -> None:
    """Write the archive; what is already there and right is kept, so it can be run again.

    Raises UserError for a cache that is unfinished or damaged, or a full disk.
    """
    cache, output = CachePaths(config.cache), config.output
    manifest = open_manifest(config.cache)
    units = read_units(cache)
    if [shard.file for unit in units for shard in unit.shards] != [s.file for s in manifest.shards]:
        raise UserError(f"{cache.root}: manifest.json is older than the units; run `prep finish`")
    if output.resolve() == cache.root.resolve():
        raise UserError("--output must be another folder than --cache")
    refuse_strangers(output, {f"{unit.name}.json" for unit in units}, cache.root, "--output")
    names = [path.name for path in (cache.identity, cache.conditioning, cache.manifest)]
    names += [cache.holdout.name] if cache.holdout.exists() else []
    names += [f"units/{unit.name}.json" for unit in units]
    names += [unit.samples for unit in units]
    small = [cache.root / name for name in names]
    if missing := [path for path in small if not path.is_file()]:
        raise UserError(f"{missing[0]} is missing; `prep verify --repair` tells how to mend it")
    refuse_names([*names, *(shard.file + SUFFIX for shard in manifest.shards)])
    with guard(output):
        output.mkdir(parents=True, exist_ok=True)
        (output / SUMS).unlink(missing_ok=True)  # unfinished, from now until the end
        sync_folder(output)
        sweep(output / "tmp")
    total = sum(shard.size for shard in manifest.shards)
    if (free := free_bytes(output)) < total:
        print(f"{size_of(free)} free for up to {size_of(total)} of shards", file=sys.stderr)
    threads = config.threads or cpus.cpus()
    sums: dict[str, str] = {}
    with Progress("pack", len(manifest.shards), "shard") as progress:
        for shard in manifest.shards:
            name = shard.file + SUFFIX
            sums[name] = pack_shard(cache, shard, output, config.level, threads)
            progress.update(1)
    for name, path in zip(names, small, strict=True):
        sums[name] = copy_small(path, output / name, output / "tmp")
    for unit in units:
        if sums[unit.samples] != unit.samples_sha256:
            raise UserError(f"{cache.root}/{unit.samples} is damaged; see `prep verify --repair`")
    packed = sum((output / name).stat().st_size for name in sums)
    publish([write_sums(sums)], output / SUMS, output / "tmp")
    with contextlib.suppress(OSError):  # another pack is still at it
        (output / "tmp").rmdir()
    original = total + sum(path.stat().st_size for path in small)
    print(
        f"{output}: {counted(len(sums), 'file')}, {size_of(packed)}, "
        f"{percent(packed, original)} of the cache"
    )


def pack_shard(cache: CachePaths, shard: Shard, output: Path, level: int, threads: int) -> str:
    """Compress a shard unless that is done; returns the sha256 of the compressed file.

    Raises UserError where the shard's bytes are not those that were committed.
    """
    target = output / (shard.file + SUFFIX)
    if target.is_file() and is_packed(target, shard):
        return file_sha256(target)
    compressor = zstandard.ZstdCompressor(level, threads=threads, write_checksum=True)
    return publish(compressed(cache.root / shard.file, shard, compressor), target, output / "tmp")


def compressed(path: Place, shard: Shard, compressor: zstandard.ZstdCompressor) -> Iterator[bytes]:
    """Compress a shard; when the last bytes have come, the shard is known to be whole."""
    digest = hashlib.sha256()
    stream = compressor.compressobj(size=shard.size)
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                yield stream.compress(block)
        if digest.hexdigest() == shard.sha256:
            yield stream.flush()
            return
    except (FileNotFoundError, zstandard.ZstdError):  # gone, or of another size by now
        pass
    raise UserError(f"{path} is damaged; `prep verify --repair` tells how to mend it")


def is_packed(target: Path, shard: Shard) -> bool:
    """Does the compressed file hold just this shard?"""
    digest = hashlib.sha256()
    try:
        for block in decompressed(target):
            digest.update(block)
    except zstandard.ZstdError:
        return False
    return digest.hexdigest() == shard.sha256


def decompressed(path: Path) -> Iterator[bytes]:
    """Yield the content of a zstd file. Raises ZstdError where it is damaged.

    A cut is no error to zstd, so whoever reads compares size or hash. A block is never longer than
    `BLOCK`, whatever the file claims to hold.
    """
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        while block := stream.read(BLOCK):
            yield block


def copy_small(source: Place, target: Place, tmp: Path) -> str:
    """Copy a file unless that is done; returns its sha256."""
    digest = file_sha256(source)
    if target.is_file() and file_sha256(target) == digest:
        return digest
    return copy_durably(source, target, tmp)
