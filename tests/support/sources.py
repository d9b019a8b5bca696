"""What the tests of stage one share: small pictures, tars of them, and ways to read a cache.

Caches are read here with tarfile, NumPy and pyarrow alone, so that the tests do not believe
`shared.cache.layout` about itself.
"""

import contextlib
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from prep.__main__ import main
from prep.commands import encode as prep_encode
from prep.config import EncodeConfig

ROOT = Path(__file__).resolve().parents[2]
TINY_SD = ROOT / "data" / "tiny-sd"
TINY_XL = ROOT / "data" / "tiny-xl"
SIDE = 64  # the tiny models' resolution

Files = list[tuple[str, bytes]]


# --- pictures -----------------------------------------------------------------------------------


def photo(seed: int, width: int = 72, height: int = 72) -> Image.Image:
    """Soft blobs of colour with some grain: no symmetry, no flat area."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-12, 13, smooth.shape)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int, width: int = 72, height: int = 72) -> bytes:
    return file_of(photo(seed, width, height))


def captioned(numbers: Iterable[int]) -> Files:
    """PNG and txt of some pictures, in img2dataset's manner; picture n is the same everywhere."""
    return [
        file
        for n in numbers
        for file in (
            (f"{n:04d}.png", png(n, 64 + 8 * (n % 4), 64 + 8 * (n % 3))),
            (f"{n:04d}.txt", f"picture number {n}".encode()),
        )
    ]


# --- sources ------------------------------------------------------------------------------------


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_folder(path: Path, numbers: Iterable[int], **captions: str) -> Path:
    """A folder of PNGs with metadata.jsonl; `captions` replaces some: `n3="another caption"`."""
    path.mkdir(exist_ok=True)
    rows = []
    for n in numbers:
        if not (path / f"{n:04d}.png").exists():
            (path / f"{n:04d}.png").write_bytes(png(n))
        text = captions.get(f"n{n}", f"picture number {n}")
        rows.append({"file_name": f"{n:04d}.png", "text": text})
    write_rows(path, rows)
    return path


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


# --- running ------------------------------------------------------------------------------------


def encode(shards: Any, cache: Path, **flags: Any) -> Path:
    """`prep encode` in this process, on one thread, without its words; returns the cache."""
    shards = (shards,) if isinstance(shards, str | Path) else shards
    settings = {"model": "tiny-sd", "threads": 1, "latents": "mean", "report": False, **flags}
    threads = torch.get_num_threads()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            prep_encode(EncodeConfig(tuple(map(str, shards)), cache=cache, **settings))
    finally:
        torch.set_num_threads(threads)
    return cache


@dataclass(frozen=True)
class Answer:
    """What a command line left behind."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that begin with `error:`."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def prep(*words: Any) -> Answer:
    """`python -m prep WORDS` in this process: exit status, stdout and stderr.

    An exception other than SystemExit, which a user would see as a traceback, passes through.
    """
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["prep", *map(str, words)]),
        pytest.raises(SystemExit) as exit,
    ):
        main()
    torch.set_num_threads(threads)
    return Answer(int(exit.value.code or 0), out.getvalue(), err.getvalue())


def refusal(*words: Any) -> str:
    """The one-line error with which `python -m prep WORDS` must end."""
    answer = prep(*words)
    assert answer.status in (1, 2), answer  # 2: the command line cannot be understood
    assert len(answer.errors) == 1, answer.err
    assert answer.err.splitlines()[-1] == answer.errors[0], answer.err
    return answer.errors[0].removeprefix("error: ")


# --- reading ------------------------------------------------------------------------------------


# Written for people, with times in them: no part of the bytes that a cache promises.
DERIVED = ("report.html", "throughput.json")


def tree(folder: Path, *without: str) -> dict[str, str]:
    """Every file below `folder` with the hash of its content, but for what is derived."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (*DERIVED, *without)
    }


def units(cache: Path) -> dict[str, dict[str, Any]]:
    """The commit records by name."""
    return {p.stem: json.loads(p.read_text()) for p in sorted((cache / "units").glob("*.json"))}


def manifest(cache: Path) -> dict[str, Any]:
    return dict(json.loads((cache / "manifest.json").read_text()))


def accounts(cache: Path) -> list[dict[str, Any]]:
    """The rows of samples/*.parquet, of committed units only."""
    tables = [pq.read_table(cache / unit["samples"]) for unit in units(cache).values()]
    return [row for table in tables for row in table.to_pylist()]


def shards(cache: Path) -> list[Path]:
    """The shards that the manifest lists, in its order."""
    return [cache / row["file"] for row in manifest(cache)["shards"]]


def raw_samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members (by what follows the key) of each sample of a shard."""
    with tarfile.open(shard, "r:") as tar:
        found: dict[str, dict[str, bytes]] = {}
        for info in tar:
            key, _, member = info.name.partition(".")
            file = tar.extractfile(info)
            assert file is not None
            found.setdefault(key, {})[member] = file.read()
    yield from found.items()


@dataclass(frozen=True)
class Cached:
    """A sample as a stranger would read it."""

    key: str
    record: dict[str, Any]
    arrays: dict[str, np.ndarray]
    members: dict[str, bytes]


def samples(cache: Path) -> dict[str, Cached]:
    """The samples by their key in the source (where it fits the record); of equal keys the last."""
    found = {}
    for shard in shards(cache):
        for key, members in raw_samples(shard):
            record = json.loads(members["json"])
            arrays = {
                name.removesuffix(".npy"): np.load(io.BytesIO(content), allow_pickle=False)
                for name, content in members.items()
                if name.endswith(".npy")
            }
            found[record.get("source_key", key)] = Cached(key, record, arrays, members)
    return found
