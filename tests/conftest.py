"""What many tests start from: the repository, the tiny models, a cache of each, the commands."""

import contextlib
import fcntl
import gc
import importlib
import io
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import warm

ROOT = Path(__file__).resolve().parents[1]
LONGEST = {
    "test_crash.py", "test_compare.py", "test_evaluate.py", "test_parallel.py", "test_parts.py",
    "test_docs_blocks.py", "test_compare_cost.py", "test_dmd_runs.py", "test_resume.py",
    "test_again.py", "test_hub.py", "test_launch.py", "test_weights.py", "test_benchmarks.py",
}  # fmt: skip


# What is imported when there is work for it, and would be in every process that is forked for some.
LATER = {
    "prep.encode.engine": ["pandas", "pillow_heif", "transformers.models.clip.tokenization_clip"],
    "train.trainer.loop": ["torch.utils.tensorboard"],
}
MEMORY = Path("/dev/shm")
ROOM = 4 << 30  # bytes; the fast tests have a tenth of it at once


def pytest_configure(config):
    """The other tests are about a CPU: hide the GPUs unless -m asks for the tests that need one.

    The folders of the fast tests lie in memory where there is room: a tenth of their time went into
    fsync.
    """
    chosen = config.option.markexpr
    if chosen and "gpu" not in chosen.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    usable = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM
    if usable and "not slow" in chosen:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_collection_modifyitems(items):
    """The modules that take longest first, so that no worker is left alone with one of them."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """To look for garbage among some thousand modules that are imported takes a fifth of it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish():
    """What the tests test is imported now, and nothing has run: the moment to fork from.

    None of it is garbage; to look through it again and again took a tenth of the tests' time.
    """
    for ours, theirs in LATER.items():
        for name in theirs if ours in sys.modules else ():
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000, 20, 20)
    warm.fork_server()


@pytest.fixture(scope="session")
def repo() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tiny_sd() -> Path:
    return ROOT / "data" / "tiny-sd"


@pytest.fixture(scope="session")
def tiny_xl() -> Path:
    return ROOT / "data" / "tiny-xl"


def encode_some(model: str, latents: str, count: int, folder: Path) -> None:
    """A cache of the first `count` pictures of data/pictures/train, made by the real command."""
    with (
        tarfile.open(ROOT / "data/pictures/train/00000.tar") as source,
        tarfile.open(folder / "some.tar", "w") as some,
    ):
        for member in source.getmembers()[: 3 * count]:  # KEY.jpg, KEY.txt, KEY.json
            some.addfile(member, source.extractfile(member))
    words = f"--shards some.tar --model {model} --cache cache --latents {latents} --threads 1"
    warm.run(
        ["-m", "prep", "encode", *words.split()], folder, OMP_NUM_THREADS="1"
    ).check_returncode()


def shared_folder(factory, name: str, make: Callable[[Path], object]) -> Path:
    """The same for all workers of a session: the first that asks makes what is in it."""
    base = factory.getbasetemp()
    here = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = here / f"shared-{name}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            make(folder)
            (folder / "made").touch()
    return folder


def shared_cache(factory, model: str, latents: str, count: int) -> Path:
    def encode(folder: Path) -> None:
        encode_some(model, latents, count, folder)

    return shared_folder(factory, f"{model}-{count}", encode) / "cache"


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory) -> Path:
    """72 pictures for tiny-sd, mean only: enough for an evaluation. Do not write into it."""
    return shared_cache(tmp_path_factory, "tiny-sd", "mean", 72)


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory) -> Path:
    """The first 24 of them: enough for a training. Do not write into it."""
    return shared_cache(tmp_path_factory, "tiny-sd", "mean", 24)


@pytest.fixture(scope="session")
def tiny_xl_cache(tmp_path_factory) -> Path:
    """24 pictures for tiny-xl, posterior. Do not write into it."""
    return shared_cache(tmp_path_factory, "tiny-xl", "posterior", 24)


@pytest.fixture
def ray(monkeypatch, tmp_path):
    """Ray with its files in a folder of its own, without tokens, usage reports or a dashboard."""
    ray = pytest.importorskip("ray")
    short = tempfile.mkdtemp(dir="/tmp")  # Ray's sockets are in it: 107 characters at most
    monkeypatch.setenv("RAY_TMPDIR", short)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # workers import what is tested
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield ray
    ray.shutdown()
    shutil.rmtree(short, ignore_errors=True)


class Answer(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch):
    """Run `python -m STAGE WORDS...` in this process: cli("train", "sample", "--run", run)."""

    def run(stage: str, *words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", [stage, *map(str, words)])
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,  # anything else is a traceback, which nobody gets
        ):
            importlib.import_module(f"{stage}.__main__").main()
        return Answer(end.value.code, out.getvalue(), err.getvalue())

    return run
