"""A run that was begun with relative paths is opened from any folder, also where it was moved."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from shared.storage.urls import place
from train.config import RunConfig
from train.state.run_config import run_config
from train.state.run_paths import from_here, to_keep


@pytest.fixture
def project(tiny_cache, tiny_sd, tmp_path, monkeypatch) -> Path:
    """A folder with a teacher and a cache in it, which is the current one."""
    folder = tmp_path / "project"
    shutil.copytree(tiny_sd, folder / "models" / "mine")
    shutil.copytree(tiny_cache, folder / "caches" / "mine")
    monkeypatch.chdir(folder)
    return folder


WORDS = [
    "distill", "--model", "models/mine", "--cache", "caches/mine", "--vae", "models/mine",
    "--threads", 1, "--train-batch-size", 2, "--max-train-steps", 1, "--lora-rank", 2,
    "--validation-steps", 0, "--device", "cpu", "--report-to", "none",
]  # fmt: skip


@pytest.mark.parametrize("absolute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_is_opened_from_another_folder(cli, project, tmp_path, monkeypatch, absolute):
    """models/mine, which could be a repository of the hub, too."""
    run = project / "runs" / "mine"
    assert cli("train", *WORDS, "--run", run if absolute else "runs/mine").status == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    answer = cli("train", "sample", "--run", run, "--prompt", "nothing that it knows")
    assert answer.status == 1
    assert "'nothing that it knows'" in answer.err.splitlines()[-1]  # it has looked in the cache
    assert cli("train", "export", "--run", "../project/runs/mine").status == 0
    if absolute:
        return
    shutil.move(project, tmp_path / "moved")
    assert cli("train", "export", "--run", tmp_path / "moved/runs/mine").status == 0
    (tmp_path / "moved/runs/mine").rename(tmp_path / "moved/runs/renamed")
    config = run_config(tmp_path / "moved/runs/renamed")
    assert config.cache == tmp_path / "moved/caches/mine"


def config_of(run: str | Path, cache: str = "caches/mine", **flags) -> RunConfig:
    return RunConfig(run=Path(run), cache=place(cache), **{"model": "models/mine"} | flags)


def test_what_leads_to_the_same_stays_as_it_was_typed(project):
    config = config_of("runs/a")
    assert to_keep(config) == config
    assert from_here(config, Path("runs/a")) == config
    assert from_here(config, project / "runs" / "a") == config


@pytest.mark.parametrize("run", ["../a", "{absolute}"])
def test_where_the_run_would_not_tell_paths_are_kept_whole(project, run):
    config = config_of(run.format(absolute=project / "a"), "s3://bucket/mine", vae="owner/name")
    kept = to_keep(config)
    assert kept == replace(config, model=str(project / "models" / "mine"))
    assert from_here(kept, Path("/elsewhere/a")) == kept


def test_the_runs_own_parts_come_before_others_of_the_same_name(project, tmp_path, monkeypatch):
    config = config_of("runs/a", model="sdxl")
    (tmp_path / "other/caches/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "other")
    there = from_here(config, project / "runs" / "a")
    assert there == replace(config, cache=project / "caches" / "mine")


def test_links_lead_to_a_run_as_well(project, tmp_path, monkeypatch):
    (project / "runs" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(project / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    assert from_here(config_of("runs/a"), Path("link")).cache == project / "caches" / "mine"
