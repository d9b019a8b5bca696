"""Flags and TOML for a small dataclass: precedence, names, mistakes."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from shared.cli.config import coerce, dispatch, parse, to_dict
from shared.errors import UsageError, UserError, run_main


@dataclass(frozen=True)
class Settings:
    """Do a thing."""

    cache_folder: Path
    """Where it is."""
    kind: Literal["lora", "full"] = "lora"
    batch_size: int = 8
    rate: float | None = None
    prompts: tuple[str, ...] = ()
    output: Path | None = None
    dry_run: bool = False


def parsed(*words: str, toml: str | None = None, tmp_path: Path | None = None) -> Settings:
    if toml is not None:
        (tmp_path / "x.toml").write_text(toml)
        words = (*words, "--config", str(tmp_path / "x.toml"))
    return parse(Settings, words, "prog do")


def test_defaults_come_from_the_dataclass():
    assert parsed("--cache-folder", "c") == Settings(Path("c"))


@pytest.mark.parametrize("dash", ["-", "_"])
def test_dashes_and_underscores(dash, tmp_path):
    words = [f"--cache{dash}folder", "c", f"--batch{dash}size=3", f"--dry{dash}run"]
    assert parsed(*words) == Settings(Path("c"), batch_size=3, dry_run=True)
    toml = f'cache{dash}folder = "c"\nbatch{dash}size = 3\ndry{dash}run = true\n'
    assert parsed(toml=toml, tmp_path=tmp_path) == Settings(Path("c"), batch_size=3, dry_run=True)


def test_the_command_line_beats_the_file_beats_the_defaults(tmp_path):
    toml = 'cache_folder = "file"\nbatch_size = 3\nrate = 0.5\nprompts = ["a", "b c"]\n'
    found = parsed("--batch-size", "4", "--prompts", "x", toml=toml, tmp_path=tmp_path)
    assert found == Settings(Path("file"), batch_size=4, rate=0.5, prompts=("x",))
    assert parsed(toml=toml, tmp_path=tmp_path).prompts == ("a", "b c")


def test_config_may_stand_anywhere_and_with_an_equals_sign(tmp_path):
    (tmp_path / "x.toml").write_text('output = "o"\nkind = "full"\n')
    wanted = Settings(Path("c"), kind="full", output=Path("o"))
    for words in (
        [f"--config={tmp_path / 'x.toml'}", "--cache-folder", "c"],
        ["--config", str(tmp_path / "x.toml"), "--cache-folder", "c"],
        ["--cache-folder", "c", "--config", str(tmp_path / "x.toml")],
    ):
        assert parsed(*words) == wanted


def test_a_file_can_give_the_required_flags_and_a_whole_number_for_a_float(tmp_path):
    found = parsed(toml='cache_folder = "c"\nrate = 1\n', tmp_path=tmp_path)
    assert (found.cache_folder, found.rate) == (Path("c"), 1)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("batchsize = 3", "no such setting: batchsize"),
        ("b = 3\na = 1", "no such setting: a, b"),
        ("batch_size = ", "Invalid value"),
        ('batch_size = "three"', "batch_size"),
        ('kind = "medium"', "kind"),
        ('prompts = "one"', "prompts"),
        ("cache_folder = 3", "cache_folder"),
    ],
)
def test_mistakes_in_the_file_name_it(tmp_path, toml, message):
    with pytest.raises(UserError, match=message) as error:
        parsed("--dry-run", toml=f'{toml}\noutput = "x"\n', tmp_path=tmp_path)
    assert str(error.value).startswith(f"--config {tmp_path / 'x.toml'}: ")
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "x.toml"):
        with pytest.raises(UserError, match="--config ") as error:
            parsed("--config", str(path))
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="wants the path"):
        parsed("--cache-folder", "c", "--config")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([], "--cache-folder"),
        (["--cache-folder", "c", "--batch-size", "x"], "--batch-size"),
        (["--cache-folder", "c", "--kind", "medium"], "medium"),
    ],
)
def test_wrong_flags_end_in_one_line_with_status_2(words, shown, capsys):
    with pytest.raises(UsageError) as error:
        parsed(*words)
    assert error.value.status == 2
    line = str(error.value)
    assert shown in line
    assert line.endswith(" --help lists the flags")
    assert not set(line) & set("\n│─╭")
    assert capsys.readouterr() == ("", "")


def test_a_config_is_saved_and_read_again():
    settings = Settings(Path("c"), rate=0.1, prompts=("a",), output=None)
    stored = to_dict(settings)
    assert stored["cache_folder"] == "c"
    as_json = {**stored, "prompts": list(stored["prompts"])}
    assert Settings(**coerce(Settings, as_json)) == settings


@pytest.fixture
def program(monkeypatch):
    """Run `prog WORDS` with two commands; returns the exit status."""
    done = []

    def run(*words: str) -> tuple[int, list]:
        monkeypatch.setattr(sys, "argv", ["prog", *words])
        commands = {"do": (Settings, done.append), "count": (Settings, lambda _: 3)}
        with pytest.raises(SystemExit) as end:
            run_main(lambda: dispatch("prog", commands))
        return end.value.code, done

    return run


def test_dispatch_runs_the_command_and_returns_its_status(program):
    assert program("do", "--cache-folder", "c") == (0, [Settings(Path("c"))])
    assert program("count", "--cache-folder", "c")[0] == 3


def test_dispatch_lists_commands_and_refuses_others(program, capsys):
    assert program()[0] == 2
    assert program("-h")[0] == 0
    assert "do         Do a thing." in capsys.readouterr().out
    assert program("undo")[0] == 2
    line = "error: 'undo' is not a command of prog; did you mean do? There are do, count\n"
    assert capsys.readouterr().err == line
    assert program("run")[0] == 2
    assert capsys.readouterr().err == "error: 'run' is not a command of prog; choose do, count\n"


FULL = "error: the GPU's memory is full; take less\n"


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (UserError("no such cache"), 1, "error: no such cache\n"),
        (KeyboardInterrupt(), 130, "interrupted: what was committed is safe; "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"), 1, FULL),
    ],
)
def test_errors_end_in_one_line(raised, status, said, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as end:
        run_main(main, "take less")
    captured = capsys.readouterr()
    assert end.value.code == status
    assert captured.err.startswith(said)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("kind", [ZeroDivisionError, RuntimeError])
def test_other_errors_keep_their_traceback(kind):
    def main():
        raise kind

    with pytest.raises(kind):
        run_main(main)
