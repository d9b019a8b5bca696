"""Every file that is read back, broken in every way: one line that names it, never a traceback."""

import contextlib
import importlib
import io
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest

from shared.cache.conditioning import load_conditioning
from shared.cache.paths import CachePaths
from shared.errors import UserError
from tests.support.damage import FEW, broken, other_values, replaced
from train.state.checkpoint import find_checkpoint, read_progress
from train.state.run_config import stored_config


def command(stage: str, *words: object) -> tuple[int, str]:
    """Exit status and what `python -m STAGE WORDS` says; a traceback fails the test."""
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        mock.patch.object(sys, "argv", [stage, *map(str, words)]),
        pytest.raises(SystemExit) as end,
    ):
        importlib.import_module(f"{stage}.__main__").main()
    return int(end.value.code or 0), said.getvalue()


class Home:
    """A finished cache, a finished run and a model, and the commands that read them."""

    def __init__(self, folder: Path, cache: Path, model: Path) -> None:
        self.cache, self.run, self.model = folder / "cache", folder / "run", folder / "model"
        shutil.copytree(cache, self.cache)
        shutil.copytree(model, self.model)
        small = ("--max-train-steps", 2, "--checkpointing-steps", 1, "--lora-rank", 2,
                 "--validation-steps", 0, "--report-to", "none", "--train-batch-size", 2,
                 "--logging-steps", 1, "--threads", 1, "--device", "cpu")  # fmt: skip
        train = ("train", "distill", "--model", self.model, "--cache", self.cache, *small)
        prompt = load_conditioning(CachePaths(self.cache).conditioning).prompts[0]
        here = ("--cache", self.cache)
        self.commands = {
            "distill": (*train, "--run", folder / "new", "--dry-run"),
            "resume": (*train, "--run", self.run, "--dry-run",
                       "--resume-from-checkpoint", "latest"),
            "sample": ("train", "sample", "--run", self.run, "--prompt", prompt, "--steps", 1,
                       "--output", folder / "s.png", "--threads", 1, "--device", "cpu"),
            "export": ("train", "export", "--run", self.run, "--output", folder / "exported"),
            "stats": ("prep", "stats", *here),
            "verify": ("prep", "verify", *here),
            "gc": ("prep", "gc", *here),
            "embed": ("prep", "embed", *here, "--prompts", "a b", "--device", "cpu",
                      "--model", self.model),
            "pack": ("prep", "pack", *here, "--output", folder / "packed"),
        }  # fmt: skip
        assert command(*train, "--run", self.run)[0] == 0
        self.folder = folder

    def file(self, name: str) -> Path:
        [found] = self.folder.glob(name)
        return found


@pytest.fixture(scope="module")
def home(tiny_cache, tiny_sd, tmp_path_factory):
    return Home(tmp_path_factory.mktemp("home"), tiny_cache, tiny_sd)


READ = [
    ("cache/manifest.json", ("distill", "stats", "verify", "gc", "pack")),
    ("cache/identity.json", ("stats", "verify")),
    ("cache/units/*.json", ("stats", "verify", "gc", "pack")),
    ("cache/conditioning.safetensors", ("distill", "sample", "verify", "embed")),
    ("cache/samples/*.parquet", ("verify",)),
    ("cache/shards/*.tar", ("distill", "verify", "pack")),
    ("run/config.json", ("sample", "export")),
    ("run/pytorch_lora_weights.safetensors", ("sample",)),
    ("model/unet/config.json", ("distill",)),
    ("model/scheduler/scheduler_config.json", ("distill",)),
    ("model/unet/*.safetensors", ("distill",)),
    ("model/vae/config.json", ("sample",)),
    ("model/vae/*.safetensors", ("sample",)),
    ("model/text_encoder/config.json", ("embed",)),
    ("model/text_encoder/*.safetensors", ("embed",)),
]
# What a file may hold and still be what diffusers or transformers read: all has a default.
LENIENT = ("model/scheduler", "model/vae/config", "model/text_encoder/config", "model/unet/config")


PAIRS = [(file, name) for file, names in READ for name in names]
# Commands that load networks before they come to the file, which is read as others are.
LONG = ("embed", "sample")


@pytest.mark.parametrize(("file", "name"), PAIRS)
def test_a_broken_file_is_one_line_that_names_it(home, file, name):
    check_broken(home, file, name, FEW if name in LONG else None)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name"), [pair for pair in PAIRS if pair[1] in LONG])
def test_broken_in_any_way_it_is_one_line_for_long_commands_too(home, file, name):
    check_broken(home, file, name)


def check_broken(home, file, name, ways=None):
    """Each way, or those that are named, ends the command in a line about the file."""
    path = home.file(file)
    for how, content in broken(path.read_bytes()).items():
        if ways is not None and how not in ways:
            continue
        if how == "an empty object" and file.startswith(LENIENT):
            continue
        if "units" in file and content is None and name != "verify":
            continue  # only files are records
        with replaced(path, how, content):
            status, said = command(*home.commands[name])
        assert status == 1, (how, said)
        lines = [line for line in said.splitlines() if line.startswith(("error: ", "damaged: "))]
        about = (path.name, path.stem, path.parent.name, str(home.model))
        assert any(word in line for line in lines for word in about), (how, said)
        if name != "verify":
            assert len(lines) == 1, (how, said)


@pytest.mark.parametrize("file", ["manifest.json", "identity.json", "units/*.json"])
def test_a_value_of_another_kind_is_never_a_traceback(home, file):
    path = home.file(f"cache/{file}")
    for how, content in other_values(path.read_bytes()):
        with replaced(path, how, content):
            status, said = command(*home.commands["stats"])
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (status, len(errors)) in ((0, 0), (1, 1)), (how, said)


@pytest.mark.parametrize("file", ["config.json", "checkpoints/*2/state.json"])
def test_a_value_of_another_kind_in_a_run_is_never_a_traceback(home, file):
    path = home.file(f"run/{file}")
    refusals = []
    for how, content in other_values(path.read_bytes()):
        with replaced(path, how, content):
            try:
                stored_config(path) if path.name == "config.json" else read_progress(path.parent)
            except UserError as error:
                refusals.append(str(error))
    assert all(str(path) in said for said in refusals)
    assert len(refusals) > 20


def test_a_manifest_that_is_cut_names_the_command_that_writes_it_again(home):
    path = home.file("cache/manifest.json")
    with replaced(path, "cut", path.read_bytes()[:100]):
        status, said = command(*home.commands["stats"])
    assert (status, "not valid JSON" in said, "run `prep finish`" in said) == (1, True, True)


def test_a_run_that_does_not_name_its_parts_is_refused(home):
    path = home.file("run/config.json")
    stored = json.loads(path.read_bytes())
    for lost in ("model", "cache", "run"):
        for content in ({**stored, lost: None}, {k: v for k, v in stored.items() if k != lost}):
            with (
                replaced(path, f"without {lost}", json.dumps(content).encode()),
                pytest.raises(UserError, match=f"is damaged .it has no {lost}"),
            ):
                stored_config(path)


@pytest.mark.parametrize(
    ("file", "change", "name"),
    [
        ("cache/manifest.json", {"format": 2}, "stats"),
        ("cache/identity.json", {"format": 2}, "stats"),
        ("cache/units/*.json", {"colour": 3}, "stats"),
        ("cache/units/*.json", {"colour": 3}, "verify"),
        ("run/config.json", {"colour": 3}, "sample"),
        ("run/checkpoints/*2/state.json", {"colour": 3}, "resume"),
    ],
)
def test_what_a_newer_version_wrote_says_so(home, file, change, name):
    path = home.file(file)
    stored = json.loads(path.read_bytes()) | change
    with replaced(path, "newer", json.dumps(stored).encode()):
        status, said = command(*home.commands[name])
    assert status == 1
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "newer version" in line
    assert "update" in line


CHECKPOINT = ["state.json", "networks.safetensors", "optimizer.safetensors"]


@pytest.mark.parametrize("file", CHECKPOINT)
def test_a_bad_checkpoint_is_left_out_of_latest(home, file, capsys):
    path = home.file(f"run/checkpoints/*2/{file}")
    for how, content in broken(path.read_bytes()).items():
        with replaced(path, how, content):
            latest = find_checkpoint(home.run, "latest")
        assert latest == path.parent.with_name("step-00000001"), how
        assert f"note: {path.parent} is damaged" in capsys.readouterr().err, how
    with replaced(path, "cut", path.read_bytes()[:50]):
        check_resumed_before(home, path.parent)


@pytest.mark.slow
@pytest.mark.parametrize("file", CHECKPOINT)
def test_a_run_goes_on_before_a_checkpoint_that_is_bad_in_any_way(home, file):
    path = home.file(f"run/checkpoints/*2/{file}")
    for how, content in broken(path.read_bytes()).items():
        with replaced(path, how, content):
            check_resumed_before(home, path.parent)


def check_resumed_before(home, damaged):
    """The command goes on, and says what it left out."""
    status, said = command(*home.commands["resume"])
    assert status == 0, said
    [note] = [line for line in said.splitlines() if line.startswith("note: ")][:1]
    assert f"{damaged} is damaged" in note, said


@pytest.mark.parametrize(
    ("entry", "value"),
    [("file", "../outside.tar"), ("file", "/outside.tar"), ("file", "shards/.."), ("count", -1),
     ("size", -1), ("layout", -1), ("layout", 7), ("sha256", "../x")],
)  # fmt: skip
def test_a_manifest_names_nothing_outside_and_counts_nothing_below_zero(home, entry, value):
    path = home.file("cache/manifest.json")
    stored = json.loads(path.read_bytes())
    stored["shards"][0][entry] = value
    with replaced(path, entry, json.dumps(stored).encode()):
        status, said = command(*home.commands["distill"])
    assert status == 1
    assert said.count("error: ") == 1
    assert "manifest.json is damaged" in said


def test_a_record_under_another_name_does_not_count_twice(home):
    unit = home.file("cache/units/*.json")
    copy = unit.with_name("copy.json")
    shutil.copy(unit, copy)
    try:
        status, said = command(*home.commands["stats"])
    finally:
        copy.unlink()
    assert status == 1
    assert "copy.json is the record of another unit" in said
