"""A frozen dataclass becomes a command line and a TOML file.

Order of precedence: the command line, then `--config FILE.toml`, then the dataclass's defaults.
Flags take dashes or underscores. Enumerations, ranges of numbers (shared/numbers.py) and help texts
come from the dataclass itself. One that has a field `typed` is told there which flags were given.
"""

from __future__ import annotations

import dataclasses
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from shared.errors import UserError
from shared.flags import translate, translate_arguments
from shared.numbers import check_numbers
from shared.places import Place, RemotePlace, place

T = TypeVar("T")

TYPED = "typed"  # a field that is no flag: the names of those that were given, whatever their value

# The type of a flag that takes a folder's path or a URL.
PlaceFlag = typing.Annotated[
    Place,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH|URL",
        instance_from_str=lambda words: place(words[0]),
        is_instance=lambda value: isinstance(value, Place),
        str_from_instance=lambda value: [str(value)],
    ),
]


def parse(kind: type[T], argv: Sequence[str], prog: str) -> T:
    """Fill the dataclass `kind` from `argv` and the TOML file it may name.

    Raises UserError for a TOML file that is missing, malformed or has unknown names, and for a
    number out of its range; a wrong flag ends the program with tyro's message and status 2.
    """
    toml, rest = _split_config(list(argv))
    known = flags_of(kind)
    rest = translate_arguments(rest, known)
    values = _read_toml(kind, toml) if toml else {}
    given = set(values) | {name for word in rest for name in named(word) if name in known}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.default is field.default_factory is dataclasses.MISSING:
            values.setdefault(field.name, tyro.MISSING)
    config = tyro.cli(kind, args=rest, prog=prog, description=kind.__doc__, default=kind(**values))
    check_numbers(config)
    if hasattr(config, TYPED):
        return dataclasses.replace(config, **{TYPED: frozenset(given)})  # type: ignore[type-var]
    return config


def flags_of(kind: type[Any]) -> set[str]:
    """The names of a dataclass's fields that are flags."""
    return {field.name for field in dataclasses.fields(kind)} - {TYPED}


def named(word: str) -> list[str]:
    """The fields that a word of the command line may stand for: `--no-x` is x, or a flag no_x."""
    if not word.startswith("--"):
        return []
    name = word[2:].partition("=")[0].replace("-", "_")
    return [name, name.removeprefix("no_")]


def _split_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    """Take `--config FILE` (or `--config=FILE`) out of the arguments."""
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag == "--config":
            if not equals and i + 1 == len(argv):
                raise UserError("--config wants the path of a TOML file")
            end = i + 1 if equals else i + 2
            return Path(value if equals else argv[i + 1]), argv[:i] + argv[end:]
    return None, argv


def _read_toml(kind: type[Any], path: Path) -> dict[str, Any]:
    try:
        stored = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or 'cannot be read'}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise UserError(f"--config {path}: {error}") from None
    known = flags_of(kind)
    values = {}
    for name, value in stored.items():
        ours, *implied = translate(name, known)
        values[ours] = implied[0] if implied and value is True else value
    if unknown := sorted(set(values) - known):
        raise UserError(f"--config {path}: no such setting: {', '.join(unknown)}")
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.startswith("pipe:"):
                raise UserError(
                    f"--config {path}: {name} = {text!r} would run a shell; type it on the "
                    "command line"
                )
        if not fits(value, hints[name]):
            wanted = str(getattr(hints[name], "__name__", hints[name])).replace("typing.", "")
            raise UserError(f"--config {path}: {name} = {value!r} is not of type {wanted}")
    return coerce(kind, values)


def fits(value: Any, hint: Any) -> bool:
    """May a TOML value stand for a field of this type?"""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in inner
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if hint is Path:
        return isinstance(value, str)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def coerce(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values from TOML or JSON with the paths and tuples that the dataclass `kind` wants."""
    hints = typing.get_type_hints(kind)
    return {name: _coerce(value, hints[name]) for name, value in values.items()}


def _coerce(value: Any, hint: Any) -> Any:
    kinds = (hint, *typing.get_args(hint))
    if value is not None and Path in kinds:
        return place(value) if RemotePlace in kinds else Path(value)
    return tuple(value) if isinstance(value, list) else value


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON values; paths become strings.

    Fields that repr hides are left out: secrets, such as tokens, and what is no flag.
    """
    shown = {field.name for field in dataclasses.fields(config) if field.repr}
    return {
        name: str(value) if isinstance(value, Place) else value
        for name, value in dataclasses.asdict(config).items()
        if name in shown
    }


def dispatch(
    prog: str, commands: Mapping[str, tuple[type[Any], Callable[[Any], int | None]]]
) -> int:
    """Run the sub-command that the command line names; returns its exit status."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {prog} COMMAND [flags]     ({prog} COMMAND --help lists the flags)\n")
        for name, (kind, _) in commands.items():
            print(f"  {name:<10} {(kind.__doc__ or '').strip().splitlines()[0]}")
        return 0 if argv else 2
    if argv[0] not in commands:
        raise UserError(f"{argv[0]!r} is not a command of {prog}; choose {', '.join(commands)}")
    kind, run = commands[argv[0]]
    return run(parse(kind, argv[1:], f"{prog} {argv[0]}")) or 0
