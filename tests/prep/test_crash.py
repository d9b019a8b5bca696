"""`prep encode` may be killed at any moment; run again it ends with the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import warm
from tests.support.sources import ROOT, captioned, encode, manifest, tree, units, write_tar

DRIVER = Path(__file__).parents[1] / "support" / "crash.py"


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: the driver fsyncs some thousand times."""
    shm = Path("/dev/shm")
    usable = shm.is_dir() and os.access(shm, os.W_OK)
    with tempfile.TemporaryDirectory(dir=shm if usable else None) as folder:
        yield Path(folder)


def drive(folder: Path, scenarios: list[str], *flags: object) -> dict[str, Any]:
    folder.mkdir()
    words = [*scenarios, "--work", folder, "--lanes", min(2, os.cpu_count() or 1), *flags]
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    answer = warm.run([DRIVER, *words], ROOT, **settings)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return dict(json.loads(answer.stdout))


@pytest.fixture(scope="module")
def crashes(memory: Path) -> dict[str, Any]:
    """At each ninth moment; dying just before a call is dying just after the one before it."""
    flags = ("--modes", "before", "half", "--distinct", "--every", 9)
    return drive(memory / "small", ["encode"], *flags)


def test_killed_before_a_call_and_in_a_write_it_ends_with_the_same_bytes(crashes):
    assert crashes["encode"]["crashes"] > 6
    assert crashes["encode"]["problems"] == []


def published(scenario: dict[str, Any]) -> list[str]:
    """The files that got their names, in order."""
    return [call[2] for call in scenario["calls"] if call[0] in ("replace", "link", "rename")]


def test_an_undisturbed_run_leaves_nothing_but_the_cache(crashes):
    kinds = {Path(name).parts[1] for name in crashes["encode"]["files"]}
    assert kinds == {
        "identity.json", "units", "shards", "samples", "conditioning.safetensors", "manifest.json",
    }  # fmt: skip
    # Nothing was written past the wrappers that count the calls.
    assert set(crashes["encode"]["files"]) == set(published(crashes["encode"]))


def test_a_power_cut_finds_whole_files(crashes):
    """What a rename makes visible has been fsynced, and so has the rename, before the next one."""
    calls = crashes["encode"]["calls"]
    visible = [i for i, call in enumerate(calls) if call[0] in ("replace", "link", "rename")]
    assert len(visible) == len(crashes["encode"]["files"])
    for i, following in zip(visible, [*visible[1:], len(calls)], strict=True):
        _, staged, final = calls[i]
        writes = [n for n, call in enumerate(calls[:i]) if call[:2] == ["write", staged]]
        assert ["fsync", staged] in calls[writes[-1] : i], final
        assert ["fsync", str(Path(final).parent)] in calls[i:following], final


def test_a_record_is_published_after_what_it_owns(crashes):
    order = [name.removeprefix("cache/") for name in published(crashes["encode"])]
    assert order[0] == "identity.json"
    assert order[-1] == "manifest.json"
    for number, name in enumerate(order):
        if name.startswith("units/"):
            unit = Path(name).stem
            mine = {other for other in order if Path(other).name.startswith(f"{unit}-")}
            assert {Path(other).parts[0] for other in mine} == {"shards", "samples"}
            assert mine <= set(order[:number])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "scenario",
    ["encode", "longer", "incremental", "overwrite", "finish", "report", "embed", "gc", "repair",
     "teach", "teach more", "pack", "unpack", "unpack over", "synthesize", "synthesize more",
     "synthesize answers", "synthesize more answers"],
)  # fmt: skip
def test_killed_before_in_and_after_every_call(memory, scenario):
    """And whoever reads then sees what was there before, or all that the command makes."""
    answer = drive(memory / scenario, [scenario])[scenario]
    assert answer["problems"] == []
    assert answer["crashes"] > len(set(map(tuple, answer["calls"])))
    writes = ("write", "truncate", "ftruncate")
    written = {call[1] for call in answer["calls"] if call[0] in writes}
    assert not written & set(answer["files"])  # nothing is written in place


RANDOM = [("many", 50), ("many changed", 50), ("teach many", 20), ("synthesize many", 20)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("scenario", "kills"), RANDOM)
def test_kills_at_random_moments(memory, scenario, kills):
    answer = drive(memory / scenario, [scenario], "--random", kills)[scenario]
    assert answer["problems"] == []
    assert answer["killed"] == kills
    assert answer["stages"] > 5  # they fell on several stages of the work


@pytest.mark.slow
def test_random_kills_of_the_real_command(tmp_path):
    for number in range(4):
        first = 100 * number
        write_tar(tmp_path / f"{number}.tar", captioned(range(first, first + 60)))
    shards = [tmp_path / f"{number}.tar" for number in range(4)]
    flags = {"vae_batch_size": 4, "text_batch_size": 4}
    wanted = encode(shards, tmp_path / "wanted", **flags)
    cache = tmp_path / "cache"
    words = [sys.executable, "-m", "prep", "encode", "--shards", *map(str, shards),
             "--model", "tiny-sd", "--cache", str(cache), "--threads", "1", "--latents", "mean",
             "--vae-batch-size", "4", "--text-batch-size", "4"]  # fmt: skip
    rng = random.Random(0)
    killed, quiet = 0, subprocess.DEVNULL
    for _ in range(4):
        process = subprocess.Popen(words, cwd=ROOT, stdout=quiet, stderr=quiet)
        before = tree(cache)
        while process.poll() is None and tree(cache) == before:
            time.sleep(0.01)  # until it changes the cache
        time.sleep(rng.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tree(cache) == tree(wanted)
    assert len(units(cache)) == 4
    assert manifest(cache)["totals"]["written"] == 240
