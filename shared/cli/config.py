"""A frozen dataclass becomes a command line and a file of settings.

Order of precedence: the command line, then `--config FILE`, then the dataclass's defaults. Flags
take dashes or underscores. Enumerations, ranges of numbers (shared/cli/ranges.py), paths
(shared/cli/paths.py) and help texts come from the dataclass itself. One that has a field `typed` is
told there which flags were given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import tyro

from shared.cli.completion import completion_script
from shared.cli.other_tools.flags import Translation, closest
from shared.cli.paths import REPEATABLE, Written, read_paths
from shared.cli.ranges import check_numbers
from shared.cli.settings_file import read_settings, split_config
from shared.errors import UsageError
from shared.storage.urls import Place, RemotePlace, place

T = TypeVar("T")

TYPED = "typed"  # a field that is no flag: the names of those that were given, whatever their value


def parse(kind: type[T], argv: Sequence[str], prog: str) -> T:
    """Fill the dataclass `kind` from `argv` and the file that its `--config` may name.

    Raises UsageError for a flag that nobody knows or that is refused (shared/cli/other_tools), for
    a file that is missing, malformed or has unknown names, for a number out of its range and for a
    path that cannot be one, and what else tyro refuses. `--help` ends the program.
    """
    file, rest = split_config(list(argv))
    known = flags_of(kind)
    rest = without_names(Translation(known).words(rest), marked(kind, tyro.conf.Positional))
    rest = gathered(rest, marked(kind, REPEATABLE))
    values = _read_file(kind, file) if file else {}
    given = set(values) | {name for word in rest for name in named(word) if name in known}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.default is field.default_factory is dataclasses.MISSING:
            values.setdefault(field.name, tyro.MISSING)
    config = _parse_words(kind, rest, prog, kind(**values))
    check_numbers(config)
    read = read_paths(kind, vars(config), Written)
    config = dataclasses.replace(config, **read)  # type: ignore[type-var]
    if hasattr(config, TYPED):
        return dataclasses.replace(config, **{TYPED: frozenset(given)})  # type: ignore[type-var]
    return config


def _parse_words(kind: type[T], words: Sequence[str], prog: str, default: T) -> T:
    """Read the words over the `default`. Raises UsageError with tyro's box in one line."""
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
            warnings.filterwarnings("ignore", module="tyro")  # of types: the file's are checked
            return tyro.cli(kind, args=words, prog=prog, description=kind.__doc__, default=default)
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(f"{unboxed(printed.getvalue())}; {prog} --help lists the flags") from None


def unboxed(box: str) -> str:
    """Return the first part of one of tyro's boxes below its title, plain and in one line.

    Where the terminal asks for it a box has colours, and frames of other characters.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│| ") for line in plain.splitlines()[1:]]
    below = itertools.dropwhile(_is_rule, lines)
    return " ".join(itertools.takewhile(lambda line: not _is_rule(line), below)).rstrip(".")


def _is_rule(line: str) -> bool:
    return not line.strip("─- ")


def flags_of(kind: type[Any]) -> set[str]:
    """Return the names of a dataclass's fields that are flags."""
    return {field.name for field in dataclasses.fields(kind)} - {TYPED}


def marked(kind: type[Any], mark: Any) -> set[str]:
    """Return the fields whose types are annotated with `mark`.

    `Positional` says that values may be typed without the flag, REPEATABLE that it may come again.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    return {n for n, hint in hints.items() if mark in getattr(hint, "__metadata__", ())}


def without_names(words: Sequence[str], names: Collection[str]) -> list[str]:
    """Return a command line without these flags, whose values stay: tyro knows only the values."""
    rest = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") in names:
            rest += [value] * bool(equals)
        else:
            rest.append(word)
    return rest


def gathered(words: Sequence[str], names: Collection[str]) -> list[str]:
    """Return a command line in which a flag of these that is given again adds to its values."""
    into = list[str]()  # what a word without a flag of its own belongs to
    groups, first = [into], dict[str, list[str]]()
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if not word.startswith("--"):
            into.append(word)
        elif name in names and name in first:
            into = first[name]
            into += [value] * bool(equals)
        else:
            into = [flag, *[value] * bool(equals)] if name in names else [word]
            first[name] = into
            groups.append(into)
    return [word for group in groups for word in group]


def named(word: str) -> list[str]:
    """Return the fields that a word may stand for: `--no-x` is x, or a flag no_x."""
    if not word.startswith("--"):
        return []
    name = word[2:].partition("=")[0].replace("-", "_")
    return [name, name.removeprefix("no_")]


def _read_file(kind: type[Any], path: Path) -> dict[str, Any]:
    """Read a file's settings in our names, each of its field's type, paths as they are written."""
    stored, translation = read_settings(path), Translation(flags_of(kind))
    if unknown := sorted(name for name in stored if translation.is_unknown(name)):
        near = translation.closest(unknown[0]) if len(unknown) == 1 else ""
        hint = f"; did you mean {near}?" if near else ""
        raise UsageError(f"--config {path}: no such setting: {', '.join(unknown)}{hint}")
    values: dict[str, Any] = {}
    for name, value in stored.items():
        values.update(translation.settings(name, value))
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.startswith("pipe:"):
                raise UsageError(
                    f"--config {path}: {name} = {text!r} would run a shell; type it on the "
                    "command line"
                )
        if not fits(value, hints[name]):
            wanted = str(getattr(hints[name], "__name__", hints[name])).replace("typing.", "")
            raise UsageError(f"--config {path}: {name} = {value!r} is not of type {wanted}")
    paths = read_paths(kind, values)
    rest = {name: value for name, value in values.items() if name not in paths}
    return {**coerce(kind, rest), **paths}


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
    """Return values from TOML or JSON with the paths and tuples that the dataclass `kind` wants."""
    hints = typing.get_type_hints(kind)
    return {name: _coerce(value, hints[name]) for name, value in values.items()}


def _coerce(value: Any, hint: Any) -> Any:
    kinds = (hint, *typing.get_args(hint))
    if value is not None and Path in kinds:
        return place(value) if RemotePlace in kinds else Path(value)
    return tuple(value) if isinstance(value, list) else value


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as JSON values; paths become strings.

    Fields that repr hides are left out: secrets, such as tokens, and what is no flag.
    """
    shown = {field.name for field in dataclasses.fields(config) if field.repr}
    return {
        name: _to_json(value) for name, value in dataclasses.asdict(config).items() if name in shown
    }


def _to_json(value: Any) -> Any:
    if isinstance(value, Place):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


Command = Callable[[Any], int | None]  # of a configuration; returns an exit status, or None for 0


def command(module: str, name: str) -> Command:
    """Name a function that is imported when it runs, so that --help and mistakes answer at once."""

    def run(config: Any) -> int | None:
        status: int | None = getattr(import_module(module), name)(config)
        return status

    return run


def dispatch(prog: str, commands: Mapping[str, tuple[type[Any], Command]]) -> int:
    """Run the sub-command that the command line names; returns its exit status."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {prog} COMMAND [flags]     ({prog} COMMAND --help lists the flags)\n")
        for name, (kind, _) in commands.items():
            print(f"  {name:<10} {(kind.__doc__ or '').strip().splitlines()[0]}")
        print("\nEvery command takes --config FILE, settings in TOML or JSON.")
        print(f"{prog} --version; {prog} --print-completion bash|zsh|fish")
        return 0 if argv else 2
    if argv[0] == "--version" or argv[1:] == ["--version"]:
        print(f"latent-distillery {installed_version()}")
        return 0
    if argv[0].partition("=")[0] == "--print-completion":
        shell = "".join(argv[1:2]) or argv[0].partition("=")[2]
        program = prog.replace("python -m ", "distillery-")  # which is what has completions
        kinds = {name: kind for name, (kind, _) in commands.items()}
        print(completion_script(program, kinds, shell, TYPED))
        return 0
    if argv[0] not in commands:
        near = closest(argv[0], commands)
        hint = f"did you mean {near}? There are" if near else "choose"
        raise UsageError(f"{argv[0]!r} is not a command of {prog}; {hint} {', '.join(commands)}")
    kind, run = commands[argv[0]]
    return run(parse(kind, argv[1:], f"{prog} {argv[0]}")) or 0


def installed_version() -> str:
    """Return that of the installed package; a checkout that is not installed has none."""
    try:
        return version("latent-distillery")
    except PackageNotFoundError:
        return "(not installed)"
