"""The ranges of numbers: in the parser, TOML and --help, and one for every number there is."""

import dataclasses
import importlib
import types
import typing
from dataclasses import dataclass
from typing import Annotated

import pytest

from shared.cli.config import parse
from shared.cli.ranges import BelowOne, Count, Fraction, Natural, Numbers, Positive, annotation
from shared.errors import UsageError, UserError


@dataclass(frozen=True)
class Settings:
    """Do a thing."""

    count: Count = 1
    limit: Count | None = None
    steps: Natural = 5
    rate: Positive = 1.0
    gamma: Positive | None = None
    decay: BelowOne = 0.9
    share: Fraction = 0.5
    level: Annotated[int, Numbers(int, 1, 19)] = 3


GOOD = [("count", 1), ("limit", 7), ("steps", 0), ("rate", 1e-9), ("gamma", 5), ("decay", 0),
        ("share", 0), ("share", 1), ("level", 19)]  # fmt: skip
BAD = [
    ("count", 0, "must be at least 1"), ("limit", -3, "must be at least 1"),
    ("steps", -1, "must be at least 0"), ("rate", 0, "must be above 0"),
    ("rate", "nan", "must be above 0"), ("rate", "inf", "must be above 0"),
    ("gamma", -5, "must be above 0"), ("decay", 1, "must be from 0 to below 1"),
    ("decay", "nan", "must be from 0 to below 1"), ("share", 1.5, "must be from 0 to 1"),
    ("level", 20, "must be from 1 to 19"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_numbers_in_range_are_taken(name, value):
    assert getattr(parse(Settings, [f"--{name}", str(value)], "prog"), name) == value


@pytest.mark.parametrize("way", ["flag", "toml"])
@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_others_are_one_line(name, value, message, way, tmp_path):
    words = [f"--{name}={value}"]
    if way == "toml":
        number = f"{value}.0" if name in ("rate", "gamma") and value != str(value) else value
        (tmp_path / "x.toml").write_text(f"{name} = {number}\n")
        words = ["--config", str(tmp_path / "x.toml")]
    with pytest.raises(UserError) as error:
        parse(Settings, words, "prog")
    assert str(error.value) == f"--{name} {value} {message}"


def test_help_shows_them(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, ["--help"], "prog")
    shown = capsys.readouterr().out
    for part in ("--count INT>=1 ", "--limit {None}|INT>=1 ", "--rate FLOAT>0 ",
                 "--decay 0<=FLOAT<1 ", "--share 0<=FLOAT<=1 ", "--level 1<=INT<=19 "):  # fmt: skip
        assert part in shown


def test_no_number_at_all_is_told():
    with pytest.raises(UsageError) as error:
        parse(Settings, ["--limit", "ten"], "prog")
    assert "--limit" in str(error.value)
    assert "ten" in str(error.value)
    assert "0x" not in str(error.value)  # no addresses of functions


@pytest.mark.parametrize("stage", ["train", "prep", "infer"])
def test_every_number_of_every_command_has_a_range(stage):
    for kind, _ in importlib.import_module(f"{stage}.__main__").COMMANDS.values():
        hints = typing.get_type_hints(kind, include_extras=True)
        plain = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            hint = plain[field.name]
            union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
            if {int, float} & set(typing.get_args(hint) if union else (hint,)):
                numbers = annotation(hints[field.name], Numbers)
                assert numbers is not None, (kind, field.name)
                assert field.default is None or field.default in numbers, (kind, field.name)
