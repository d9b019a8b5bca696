"""Caches and runs that the version before the wings wrote: they open, go on and come out the same.

`tests/fixtures/before_wings` was written by the commit "Leave the files of a process that begins
in a folder being swept":

    python -m prep encode --shards pictures.tar --model ./tiny-sd --cache cache --resolution 32 \
        --vae-batch-size 4 --threads 1 --no-report --preview-prompts "a red circle"
    python -m train distill --model ./tiny-sd --cache cache --run run --student lora \
        --lora-rank 1 --lora-target-modules to_q,to_k --seed 3 --train-batch-size 2 \
        --max-train-steps 4 --checkpointing-steps 2 --device cpu --threads 1
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.cli.config import to_dict
from train.config import RunConfig

WRITTEN = 1_700_000_000  # when pictures.tar was last changed, which its unit's record holds
LORA = "pytorch_lora_weights.safetensors"
ENCODE = (
    "encode", "--shards", "pictures.tar", "--model", "./tiny-sd", "--resolution", 32,
    "--vae-batch-size", 4, "--threads", 1, "--no-report", "--preview-prompts", "a red circle",
)  # fmt: skip
DISTILL = (
    "distill", "--model", "./tiny-sd", "--cache", "cache", "--run", "run", "--student", "lora",
    "--lora-rank", 1, "--lora-target-modules", "to_q,to_k", "--seed", 3, "--train-batch-size", 2,
    "--max-train-steps", 4, "--checkpointing-steps", 2, "--device", "cpu", "--threads", 1,
    "--validation-steps", 1000,
)  # fmt: skip


@pytest.fixture
def before(tmp_path, monkeypatch, repo, tiny_sd):
    """The folder in which the old version worked; commands run in it."""
    work = shutil.copytree(repo / "tests" / "fixtures" / "before_wings", tmp_path / "work")
    (work / "tiny-sd").symlink_to(tiny_sd)
    os.utime(work / "pictures.tar", (WRITTEN, WRITTEN))
    for path in (work / "run").rglob("*"):  # git keeps no times; an export is younger than its step
        later = 0 if "checkpoints" in path.parts else 60
        os.utime(path, (WRITTEN + later, WRITTEN + later))
    monkeypatch.chdir(work)
    return work


def samples_of(root: Path) -> dict[str, dict[str, np.ndarray]]:
    """All arrays of a cache's samples by their keys."""
    found = {}
    for shard in open_manifest(root).shards:
        for index in range(shard.count):
            key, _, arrays = shard.layout.read(root / shard.file, index)
            found[key] = dict(arrays)
    return found


def assert_close(found: Path, wanted: Path) -> None:
    """The same tensors under the same names, but for the arithmetic of another processor."""
    tensors, expected = load_file(found), load_file(wanted)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-6)


def content_but_versions(path: Path):
    """A file's bytes; of the manifest all but the libraries' versions, which are today's."""
    if path.name != "manifest.json":
        return path.read_bytes()
    return {
        name: value for name, value in json.loads(path.read_text()).items() if name != "versions"
    }


def test_a_cache_of_before_is_whole_and_has_nothing_to_do(before, cli):
    assert cli("prep", "verify", "--cache", "cache").status == 0
    paths = [path for path in (before / "cache").rglob("*") if path.is_file()]
    files = {path: content_but_versions(path) for path in paths}
    assert cli("prep", *ENCODE, "--cache", "cache").status == 0
    assert {path: content_but_versions(path) for path in files} == files


def test_a_cache_made_anew_is_that_of_before(before, cli):
    assert cli("prep", *ENCODE, "--cache", "new").status == 0
    old, new = (CachePaths(before / name) for name in ("cache", "new"))
    assert new.identity.read_bytes() == old.identity.read_bytes()
    (record,), (wanted,) = (list((c.root / "units").iterdir()) for c in (new, old))
    assert record.name == wanted.name
    assert json.loads(record.read_text()).keys() == json.loads(wanted.read_text()).keys()
    found, expected = samples_of(new.root), samples_of(old.root)
    assert list(found) == list(expected)
    for key, arrays in expected.items():
        assert found[key].keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_allclose(found[key][name], array, rtol=2e-3, atol=2e-3)


def test_a_run_of_before_goes_on_from_its_checkpoint_to_its_end(before, cli):
    run = before / "run"
    wanted = run.rename(before / "wanted")
    shutil.copytree(wanted, run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    for name in (LORA, "kohya_lora_weights.safetensors"):
        (run / name).unlink()
    answer = cli("train", *DISTILL)
    assert answer.status == 0, answer.err
    assert "from run/checkpoints/step-00000002" in answer.err
    last = "checkpoints/step-00000004"
    for name in (LORA, "kohya_lora_weights.safetensors", f"{last}/networks.safetensors",
                 f"{last}/optimizer.safetensors"):  # fmt: skip
        assert_close(run / name, wanted / name)
    assert (run / last / "state.json").read_bytes() == (wanted / last / "state.json").read_bytes()
    flags, expected = (json.loads((r / "config.json").read_text()) for r in (run, wanted))
    defaults = to_dict(RunConfig(model="", cache=Path(), run=Path()))
    younger = {name: defaults[name] for name in flags.keys() - expected.keys()}
    assert flags == younger | expected | {"resume_from_checkpoint": "latest", "teacher": "online"}


def test_an_export_of_before_is_byte_for_byte_the_same(before, cli):
    assert cli("train", "export", "--run", "run", "--output", "out").status == 0
    for name in (LORA, "kohya_lora_weights.safetensors", "scheduler/scheduler_config.json"):
        assert (before / "out" / name).read_bytes() == (before / "run" / name).read_bytes()


def test_a_finished_run_of_before_says_so(before, cli):
    answer = cli("train", *DISTILL)
    assert answer.status == 0
    assert "finished" in answer.out + answer.err
