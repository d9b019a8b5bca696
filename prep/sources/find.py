"""Where pictures come from: the one place that turns `--shards` into units of rows.

A tar or a Parquet file is a unit, a folder or a dataset is cut into several. A unit can be read
again and gives the same rows. docs/sources.md has the table of what `--shards` takes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prep.files.remote import Found, RemoteFile, find_remote
from prep.files.stream import Command, LocalFile
from prep.images.kinds import HEAD_BYTES, not_a_source
from prep.rows.row import MAX_IMAGE_BYTES, SourceError
from prep.rows.unit import UNIT_ROWS, Reader, SourceOptions, Unit, given_flags, stem, unit_name
from prep.sources.braces import expand_braces
from prep.sources.folders.folder import FolderReader, folder_units
from prep.sources.folders.listing import list_folder
from prep.sources.folders.tree import walk
from prep.sources.patterns import TARS, is_url, local_path, matches, refuse_gaps, without_sidecars
from prep.sources.tables.hf_dataset import RangeReader, ShardReader, dataset_units
from prep.sources.tables.open_dataset import HUB, is_saved_dataset
from prep.sources.tables.parquet import ParquetReader
from prep.sources.tars.tar import Stream, TarReader
from shared.errors import UserError
from shared.sanitize import printable

PIPE = "pipe:"
TEXTS = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".md", ".log", ".toml", ".yaml", ".yml")
TABLES = (ParquetReader, RangeReader, ShardReader)  # may name pictures outside of themselves
COUNTED = 16  # units whose rows are counted; the others' are estimated by size

__all__ = ["SourceError", "SourceOptions", "Unit", "estimate_rows", "find_units", "options_of"]


def find_units(shards: Sequence[str], options: SourceOptions | None = None) -> list[Unit]:
    """Find the units that `--shards` names, sorted by name.

    Raises UserError where a pattern matches nothing, naming the nearest thing that exists. Without
    `options.pipes` a `pipe:` is refused, so that what a file says runs no shell.
    """
    options = options or SourceOptions()
    found: list[Unit] = []
    urls: list[str] = []
    for shard in shards:
        if shard.startswith(PIPE):
            found += _pipes(shard, options)
        elif shard and os.path.lexists(path := local_path(shard)):  # meant, whatever its name has
            found += _local(Path(os.path.normpath(path)), options)
        else:
            names = expand_braces(shard)
            refuse_gaps(names, shard)
            urls += [name for name in names if is_url(name)]
            found += [u for name in names if not is_url(name) for u in _find(name, options)]
    remote = find_remote(urls)
    kept = {*urls, *without_sidecars([one.url for one in remote])}
    found += [_remote(one, options) for one in remote if one.url in kept]
    units = {unit.name: unit for unit in found}.values()
    _check_columns(list(units))
    _refuse_idle_flags([unit.reader for unit in units], options)
    marked = (replace(unit, state={**unit.state, **_limits(unit, options)}) for unit in units)
    return sorted(marked, key=lambda unit: unit.name)


def _limits(unit: Unit, options: SourceOptions) -> dict[str, Any]:
    """With other limits than the usual ones other rows are rejected: it is another unit."""
    limits: dict[str, Any] = {}
    if options.max_image_bytes != MAX_IMAGE_BYTES:
        limits["max_image_bytes"] = options.max_image_bytes
    if options.allow_external_images and isinstance(unit.reader, TABLES):
        limits["external_images"] = True
    return limits


def options_of(state: Mapping[str, Any]) -> SourceOptions:
    """Read from a unit's state the flags it was read with, but for those that cut it to units."""
    return SourceOptions(
        # As flagged for Parquet, as chosen for a dataset: chosen again, it is the same.
        image_column=state.get("image_column", state.get("image")),
        caption_column=state.get("caption_column", state.get("caption")),
        caption_encoding=state.get("caption_encoding"),
        key_column=state.get("key_column", state.get("key")),
        streaming="shard" in state,
        max_image_bytes=state.get("max_image_bytes", MAX_IMAGE_BYTES),
    )


def estimate_rows(units: Sequence[Unit]) -> dict[str, int]:
    """Rows of each unit by name: counted in the first few of unknown size, else scaled by bytes."""
    rows = {unit.name: unit.rows_known for unit in units if unit.rows_known is not None}
    unknown = [unit for unit in units if unit.rows_known is None]
    counted = size = 0
    for unit in [unit for unit in unknown if unit.size][:COUNTED]:
        found, measured = unit.reader.sample()
        counted, size = counted + found, size + measured
        if measured:
            rows[unit.name] = round(found / measured * (unit.size or measured))
    for unit in unknown:
        typical = counted / size * unit.size if size and unit.size else UNIT_ROWS
        rows.setdefault(unit.name, round(typical))
    return rows


def _pipes(shard: str, options: SourceOptions) -> list[Unit]:
    if not options.pipes:
        raise UserError(f"{shard!r} would run a shell; type it on the command line, in --shards")
    names = expand_braces(shard, escapes=False)  # backslashes are the shell's
    commands = [Command(name.removeprefix(PIPE)) for name in names]
    return [_tar(one, "pipe", None, {"command": one.source}, options) for one in commands]


def _find(name: str, options: SourceOptions) -> list[Unit]:
    """Units of a hub dataset, a path or a glob of paths."""
    if HUB.fullmatch(name):
        return dataset_units(name, options)
    found = matches(name)
    if not found or not os.path.lexists(found[0]):
        parent = Path(local_path(name)).parent
        hint = f"{parent} has no such file" if parent.is_dir() else f"{parent} does not exist"
        raise UserError(f"--shards: nothing matches {printable(name)!r} ({printable(hint)})")
    paths = (Path(os.path.normpath(path)) for path in found)
    return [unit for path in paths for unit in _local(path, options)]


def _local(path: Path, options: SourceOptions) -> list[Unit]:
    if path.is_dir():
        return _folder(path, options)
    file = LocalFile(str(path))
    if not path.exists():
        raise UserError(f"{file.source} is a link to what is not there")
    if not path.is_file():
        raise UserError(f"{file.source} is a pipe or a device; pass a file, or 'pipe:cat ...'")
    stat = path.stat()
    if stat.st_size == 0:
        raise UserError(f"{file.source} is empty; download it again or leave it out of --shards")
    if path.suffix == ".arrow":
        return dataset_units(str(path), options)
    state = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if path.suffix == ".parquet":
        return [_parquet(file, path.name, stat.st_size, state, options)]
    if not path.name.endswith(TARS):  # whose damage costs their unit only, when they are read
        with file.open() as opened:
            head = opened.read(HEAD_BYTES)
        if head.startswith(b"PAR1"):  # data.pq, or a blob of the hub's cache
            return [_parquet(file, path.name, stat.st_size, state, options)]
        _refuse_other_files(path, file, head)
    return [_tar(file, path.name, stat.st_size, state, options)]


def _refuse_other_files(path: Path, file: LocalFile, head: bytes) -> None:
    what = not_a_source(head)
    if head.startswith(b"ARROW1"):
        what = f"an Arrow file; name it {path.stem}.arrow"
    if not what and path.suffix.lower() in TEXTS:
        what = "a text; if it describes pictures, pass the folder that they are in"
    if what:
        raise UserError(f"{file.source} is {what}")


def _folder(path: Path, options: SourceOptions) -> list[Unit]:
    """Units of a saved dataset, of a folder of pictures, or of the tars or tables in a folder."""
    if is_saved_dataset(path):
        return dataset_units(str(path), options)
    members = list_folder(path, options.caption_encoding)
    if not any(member.may_have_caption for member in members):
        names = [str(path / level.path / name) for level in walk(path) for name in level.names]
        for endings in (TARS, (".parquet",)):
            if found := sorted(name for name in names if name.endswith(endings)):
                return [unit for name in found for unit in _local(Path(name), options)]
    return folder_units(path, members, options)


def _remote(found: Found, options: SourceOptions) -> Unit:
    file = RemoteFile(found.url)
    path = urlsplit(found.url).path
    if path.endswith(".parquet"):
        if found.size is None:
            raise UserError(f"{file.source}: the server does not say its size; download it first")
        return _parquet(file, path, found.size, found.state, options)
    return _tar(file, path, found.size, found.state, options)


def _tar(
    stream: Stream, path: str, size: int | None, state: Mapping[str, Any], options: SourceOptions
) -> Unit:
    state = {**state, **given_flags(options)}
    return _unit(stream, path, state, TarReader(stream, size, options), size)


def _parquet(
    file: LocalFile | RemoteFile, path: str, size: int, state: Any, options: SourceOptions
) -> Unit:
    state = {**state, **given_flags(options, "image_column", "key_column")}
    return _unit(file, path, state, ParquetReader(file, size, options), size)


def _unit(
    stream: Stream, path: str, state: Mapping[str, Any], reader: Reader, size: int | None
) -> Unit:
    identity = stream.path if isinstance(stream, LocalFile) else stream.source
    return Unit(unit_name(stem(path), identity), stream.source, state, reader, size=size)


def _check_columns(units: Sequence[Unit]) -> None:
    """Refuse a wrong --image-column at once, by the first table."""
    reader = next((unit.reader for unit in units if isinstance(unit.reader, ParquetReader)), None)
    if reader is not None:
        with contextlib.suppress(SourceError):  # damage costs its unit only
            reader.columns()


def _refuse_idle_flags(readers: Sequence[Reader], options: SourceOptions) -> None:
    """Raise UserError for a flag about sources of a kind that `--shards` does not have."""
    datasets = [reader for reader in readers if isinstance(reader, RangeReader | ShardReader)]
    hub = any(reader.dataset.split is not None for reader in datasets)
    tables = datasets or any(isinstance(reader, ParquetReader) for reader in readers)
    cut = any(
        isinstance(reader, FolderReader) or (isinstance(reader, RangeReader) and reader.part)
        for reader in readers
    )
    for flag, kind, there in (
        ("dataset_config_name", "datasets of the hub (hf://)", hub),
        ("streaming", "datasets of the hub (hf://)", hub),
        ("image_column", "Parquet files and datasets", tables),
        ("key_column", "Parquet files and datasets", tables),
        ("allow_external_images", "Parquet files and datasets", tables),
        ("folder_units", "folders, and for datasets with --key-column", cut),
    ):
        if getattr(options, flag) and not there:
            raise UserError(f"--{flag.replace('_', '-')} is for {kind}; --shards has none")
