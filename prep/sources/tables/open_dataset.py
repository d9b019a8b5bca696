"""Opening Hugging Face datasets, from the disk or the hub, and where their pictures may lie."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.files.library_errors import raised_in
from prep.sources.tables.linked_pictures import Home, home_of, local_folders
from shared.errors import UserError, words_of
from shared.sanitize import printable

if TYPE_CHECKING:
    import datasets

# hf://OWNER/NAME, hf://OWNER/NAME:SPLIT, hf://OWNER/NAME:CONFIG:SPLIT; a split may be
# `train[:10%]`. fsspec has hf://datasets/OWNER/NAME/FILE and the like.
NAME = r"hf://(?!(?:datasets|spaces|models|buckets)/)([\w.-]+/[\w.-]+)"
HUB = re.compile(NAME + r"(?::([\w.-]+)(?=:))?(?::(\S+))?")
LIBRARIES = ("datasets", "pyarrow", "huggingface_hub", "fsspec", "httpx", "requests")
RANDOM_ACCESS = b"ARROW1"  # how Arrow's other kind of file begins, which Feather is, too


@dataclass(frozen=True)
class DatasetSource:
    """Which dataset; opened anew, or from memory, in every process."""

    source: str
    location: str  # a folder, a file, or a name on the hub
    split: str | None = None  # of one on the hub
    config: str | None = None  # likewise, where it has several


@dataclass(frozen=True)
class Opened:
    """A dataset, and what else is to be known of it."""

    data: Any  # a Dataset or an IterableDataset
    home: Home  # of its pictures, to which its rows are kept
    version: str = ""  # of one that is streamed: the commit
    splits: tuple[str, ...] = ()  # of one on the hub, as far as it says


def dataset_source(name: str, config: str | None) -> DatasetSource:
    """Tell what a path or `hf://...` stands for; of several splits it is `train`, which is said.

    Raises UserError where there is no split of that name.
    """
    if found := HUB.fullmatch(name):
        config, split = found[2] or config, found[3] or "train"
        source = ":".join(filter(None, (f"hf://{found[1]}", config, split)))
        return DatasetSource(source, found[1], split, config)
    path = Path(name)
    if (path / "dataset_dict.json").is_file():  # several splits
        splits = sorted(one.name for one in path.iterdir() if is_saved_dataset(one))
        if "train" not in splits:
            there = ", ".join(f"{path}/{split}" for split in splits) or "none"
            raise UserError(f"{path} has no split train; name one of its splits: {there}")
        say_split(str(path), "/", splits)
        path = path / "train"
    return DatasetSource(str(path), str(path))


def say_split(name: str, mark: str, splits: Sequence[str]) -> None:
    """Tell which split is read where nobody said which."""
    others = [f"{printable(name)}{mark}{split}" for split in splits if split != "train"]
    if others:
        print(
            f"{printable(name)}: only its split train is read; name the others to read them, too: "
            f"{', '.join(others)}",
            file=sys.stderr,
        )


def is_saved_dataset(path: Path) -> bool:
    """Did `save_to_disk` write this folder?"""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


@lru_cache(maxsize=4)
def load(source: DatasetSource) -> Opened:
    """Open the dataset, memory-mapped, with its pictures left as they are."""
    import datasets

    if source.split is not None:
        builder = datasets.load_dataset_builder(source.location, source.config)
        builder.download_and_prepare()
        data = builder.as_dataset(split=source.split)
        opened = Opened(data, _home_of_builder(source, builder), splits=_splits(builder))
    elif source.location.endswith(".arrow"):
        opened = Opened(_arrow_file(source.location), home_of(source.location))
    else:
        opened = Opened(datasets.load_from_disk(source.location), home_of(source.location))
    data = opened.data
    fingerprint = data._fingerprint
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    data._fingerprint = fingerprint  # a cast gives it another, and that may change with versions
    return replace(opened, data=data)


@lru_cache(maxsize=4)
def stream(source: DatasetSource) -> Opened:
    """Open a dataset of the hub that is read without downloading it first."""
    import datasets

    builder = datasets.load_dataset_builder(source.location, source.config)
    data = builder.as_streaming_dataset(split=source.split)
    if data.features is None:
        data = data._resolve_features()
    return Opened(data, _home_of_builder(source, builder), str(builder.hash), _splits(builder))


def _splits(builder: datasets.DatasetBuilder) -> tuple[str, ...]:
    return tuple(map(str, builder.info.splits or builder.config.data_files or ()))


def _arrow_file(path: str) -> datasets.Dataset:
    """Of either kind: the stream that `datasets` writes, or the file with random access."""
    import datasets
    import pyarrow as pa

    with open(path, "rb") as file:
        streamed = file.read(len(RANDOM_ACCESS)) != RANDOM_ACCESS
    if streamed:
        return datasets.Dataset.from_file(path)
    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _home_of_builder(source: DatasetSource, builder: datasets.DatasetBuilder) -> Home:
    """List the repository on the hub, what this machine has of it, and unpacked archives.

    Of a dataset that is files on this machine: the folders they are in.
    """
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    files = [str(name) for names in (builder.config.data_files or {}).values() for name in names]
    here = sorted({str(Path(name).parent) for name in files if "://" not in name})
    cached = repo_folder_name(repo_id=source.location, repo_type="dataset")
    folders = (*here, str(Path(constants.HF_HUB_CACHE, cached)))
    unpacked = str(datasets.config.EXTRACTED_DATASETS_PATH)
    base = str(builder.base_path or "")
    return Home(local_folders(*folders, unpacked), f"{base.rstrip('/')}/" if "://" in base else "")


@contextmanager
def told(source: str, kind: type[UserError]) -> Iterator[None]:
    """Say in one line what goes wrong in `datasets`, which raises all kinds of errors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not (isinstance(error, OSError) or raised_in(error, *LIBRARIES)):
            raise
        raise kind(f"{source} cannot be read: {words_of(error)}") from None
