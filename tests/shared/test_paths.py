"""Paths in flags and in files of settings: what is expanded, what is supported, what refused."""

import importlib
import json
import os
import typing
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from prep.sources.find import find_units
from shared.cli.config import parse, to_dict
from shared.cli.paths import LocalPath, NameOrPath, PathKind, PlaceFlag, SourceFlag
from shared.cli.ranges import annotation
from shared.errors import UsageError, UserError
from shared.storage.urls import RemotePlace


@dataclass(frozen=True)
class Settings:
    """Do a thing."""

    run: LocalPath = Path("r")
    cache: PlaceFlag | None = None
    model: NameOrPath = "sd15"
    shards: tuple[SourceFlag, ...] = ()
    output: LocalPath | None = None


# tyro warns of defaults of another type, which would be seen.
pytestmark = pytest.mark.filterwarnings("error")
WAYS = ("word", "equals", "toml", "json")


def given(tmp_path, way: str, name: str, value: str) -> Settings:
    """Settings with one of them typed, or in a file."""
    if way == "word":
        words = [f"--{name}", value]
    elif way == "equals":
        words = [f"--{name}={value}"]
    else:
        file = tmp_path / f"settings.{way}"
        stored = [value] if name == "shards" else value
        content = json.dumps(stored)
        file.write_text(f"{name} = {content}" if way == "toml" else json.dumps({name: stored}))
        words = ["--config", str(file)]
    return parse(Settings, words, "prog")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TAKEN = [
    ("~/x", "HERE/home/x"), ("~", "HERE/home"), ("$SCRATCH/x", "HERE/scratch/x"),
    ("${SCRATCH}x/y", "HERE/scratchx/y"), ("file:///a/b", "/a/b"), ("file:/a/b", "/a/b"),
    ("file://localhost/a%20b#1", "/a b#1"), ("./~", "./~"), ("a:b", "a:b"), ("a b", "a b"),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["run", "cache", "model", "output"])
@pytest.mark.parametrize(("text", "wanted"), TAKEN)
def test_local_paths_are_expanded(tmp_path, way, name, text, wanted):
    found = getattr(given(tmp_path, way, name, text), name)
    wanted = wanted.replace("HERE", str(tmp_path))
    assert found == (wanted if name == "model" else Path(wanted))
    assert not any(".toml" not in one and ".json" not in one for one in os.listdir(tmp_path))


REFUSED = [
    ("", "is empty"), ("  ", "is empty"), ("x ", "blanks around it"), ("\tx", "blanks around it"),
    ("$NOWHERE/x", "no variable NOWHERE"), ("~nobodyatall/x", "no user 'nobodyatall'"),
    ("file://elsewhere/x", "names the machine 'elsewhere'"),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["run", "cache", "model", "output"])
@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_would_be_another_path_is_refused(tmp_path, way, name, text, message):
    with pytest.raises(UsageError, match=message) as error:
        given(tmp_path, way, name, text)
    assert str(error.value).startswith(f"--{name} ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("url", ["s3://bucket/x", "s3:/bucket/x", "https://host/x", "memory://x"])
def test_urls_are_refused_where_files_are_local(tmp_path, way, url):
    for name, remedy in (("run", "copy"), ("output", "copy"), ("model", "owner/name")):
        with pytest.raises(UsageError, match=f"--{name} .* is a URL, not a path.*{remedy}"):
            given(tmp_path, way, name, url)


@pytest.mark.parametrize("way", WAYS)
def test_urls_of_caches_and_sources_are_left_as_they_are(tmp_path, way):
    assert isinstance(given(tmp_path, way, "cache", "memory://b/$SCRATCH").cache, RemotePlace)
    cache = given(tmp_path, way, "cache", "memory://b/$SCRATCH").cache
    assert to_dict(Settings(cache=cache))["cache"] == "memory://b/$SCRATCH"
    for name in ("cache", "shards"):
        with pytest.raises(UsageError, match=f"--{name} 's3:/b/x' is no URL"):
            given(tmp_path, way, name, "s3:/b/x")
    assert given(tmp_path, way, "shards", "s3://b/{0..9}.tar").shards == ("s3://b/{0..9}.tar",)
    for text in ("", "a.tar "):
        with pytest.raises(UsageError, match="--shards "):
            given(tmp_path, way, "shards", text)


def test_names_that_are_there_are_taken_literally(tmp_path):
    for name in ("$NOWHERE", "x "):
        (tmp_path / name).mkdir()
        assert given(tmp_path, "toml", "run", name).run == Path(name)


def test_hub_ids_and_presets_pass(tmp_path):
    for name in ("sd15", "owner/name", "latest"):
        assert given(tmp_path, "word", "model", name).model == name


@pytest.mark.parametrize(
    "pattern",
    ["~/{a,b}.tar", "{~/a,$HOME/b}.tar", "file://HERE/home/*.tar", "$SCRATCH/../home/[ab].tar"],
)
def test_sources_expand_behind_braces_and_before_globs(tmp_path, pattern):
    (tmp_path / "home").mkdir()
    (tmp_path / "scratch").mkdir()
    for name in "ab":
        (tmp_path / "home" / f"{name}.tar").write_bytes(b"\0" * 1024)
    units = find_units([pattern.replace("HERE", str(tmp_path))])
    wanted = {str(tmp_path / "home" / f"{name}.tar") for name in "ab"}
    assert {os.path.realpath(unit.source.removeprefix("file://")) for unit in units} == wanted
    with pytest.raises(UserError, match="no variable NOWHERE"):
        find_units(["$NOWHERE/*.tar"])


def test_the_file_of_settings_is_a_path_too(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "x.toml").write_text('run = "there"')
    for words in (["--config=~/x.toml"], ["--config", "$HOME/x.toml"]):
        assert parse(Settings, words, "prog").run == Path("there")
    for text in ("s3://b/x.toml", ""):
        with pytest.raises(UsageError, match="--config "):
            parse(Settings, [f"--config={text}"], "prog")


def test_every_path_of_every_command_has_its_kind():
    """A new flag that holds a path cannot forget it."""
    names = {"run", "cache", "model", "vae", "shards", "output", "input", "eval_cache",
             "local_cache", "logging_dir", "resume_from_checkpoint", "checkpoint"}  # fmt: skip
    for stage in ("prep", "train", "infer"):
        for kind, _ in importlib.import_module(f"{stage}.__main__").COMMANDS.values():
            hints = typing.get_type_hints(kind, include_extras=True)
            for field in fields(kind):
                is_path = Path in (hints[field.name], *typing.get_args(hints[field.name]))
                if field.name in names or is_path:
                    assert annotation(hints[field.name], PathKind), (kind, field.name)


def test_nothing_is_made_by_the_real_command(cli, tmp_path, tiny_cache):
    words = ("train", "distill", "--model", "tiny-sd", "--cache", tiny_cache)
    before = sorted(os.listdir(tmp_path))
    for run in ("s3://bucket/run", "", "$NOWHERE/run", "run "):
        answer = cli(*words, f"--run={run}", "--max-train-steps", 1)
        assert answer.status == 2, answer
        assert answer.err.startswith("error: --run ")
        assert answer.err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before
