"""Paths as people write them, on the command line and in files of settings, one type for each use.

`run: LocalPath` and `cache: PlaceFlag` are all that a dataclass of flags says. Local paths may have
`~` and `$NAME`, and begin with `file://`. Refused is what would quietly become another file: an
empty text, blanks around it, a URL where only local files are used. In a URL nothing is replaced,
so that no file of settings sends a variable's content anywhere.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

import tyro

from shared.cli.ranges import annotation
from shared.errors import UsageError, UserError
from shared.storage.urls import Place, place
from shared.style import join_scale, split_scale

FILE = re.compile(r"file:(?://([^/]*))?(/.*)")  # its host and its path
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # also with the one slash that pathlib leaves
NO_URL = "{!r} is no URL, which has two slashes behind its colon"
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


class Written(str):
    """A path as it was typed: tyro keeps it until `read_paths`, which can name the flag."""


class PathKind(tyro.constructors.PrimitiveConstructorSpec[Any]):
    """What a flag's text stands for: `read` makes it of the text, or raises UserError."""

    read: Callable[[str], Any]

    def __init__(self, metavar: str, read: Callable[[str], Any]) -> None:
        super().__init__(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda words: Written(words[0]),
            is_instance=lambda value: isinstance(value, str | Place),
            str_from_instance=lambda value: [str(value)],
        )
        vars(self).update(read=read)  # tyro's class is frozen


def read_paths(kind: type[Any], values: Mapping[str, Any], text: type[str] = str) -> dict[str, Any]:
    """Return the paths among a dataclass's `values`, given as `text`, as what they stand for.

    Raises UsageError that names the flag.
    """
    found = dict[str, Any]()
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        value, path = values.get(name), annotation(hint, PathKind)
        several = isinstance(value, tuple | list)
        texts: list[Any] = [*value] if isinstance(value, tuple | list) else [value]
        if path is None or not all(isinstance(one, text) for one in texts):
            continue
        try:
            read = tuple(path.read(str(one)) for one in texts)
        except UserError as error:
            raise UsageError(f"--{name.replace('_', '-')} {error}") from None
        found[name] = read if several else read[0]
    return found


def local_path(text: str) -> Path:
    """Return a file or folder of this machine."""
    return Path(
        local_text(_whole(text), "use a local path, and copy it where it shall be afterwards")
    )


def any_place(text: str) -> Place:
    """Return a folder, or a URL that fsspec knows."""
    text = _whole(text)
    if not _is_remote(text):
        return Path(local_text(text))
    if "://" not in text:
        raise UserError(NO_URL.format(text))
    return place(text)


def source(text: str) -> str:
    """Return one of `--shards`, as it is: what its braces stand for is read by `local_text`."""
    if _is_remote(_whole(text)) and "://" not in text:
        raise UserError(NO_URL.format(text))
    return text


def name_or_path(text: str) -> str:
    """Return a name such as a preset or a hub id, or a local path."""
    text = _whole(text)
    return local_text(
        text, "give its name on the hub (owner/name), or download it and give its path"
    )


def file_and_scale(text: str) -> str:
    """Return a local file with the factor behind its colon, if it has one: `style.safetensors:0.8`.

    What of it is the file is told by `shared.style`.
    """
    file, scale = split_scale(_whole(text))
    remedy = "download it (`hf download`), and give its path"
    return join_scale(local_text(file, remedy), scale)


LocalPath = Annotated[Path, PathKind("PATH", local_path)]
PlaceFlag = Annotated[Place, PathKind("PATH|URL", any_place)]
SourceFlag = Annotated[str, PathKind("PATH|URL", source)]
NameOrPath = Annotated[str, PathKind("NAME|PATH", name_or_path)]
REPEATABLE = "repeatable"  # of a flag with several values, that may be given once for each
Texts = Annotated[tuple[str, ...], REPEATABLE]
StyleText = Annotated[str, PathKind("FILE[:SCALE]", file_and_scale)]
StyleFlag = Annotated[tuple[StyleText, ...], REPEATABLE]


def local_text(text: str, remedy: str = "") -> str:
    """Return the path itself, as `open` takes it; a pattern stays one.

    Raises UserError for a URL, with `remedy`, for an unknown user and for an unset variable.
    """
    if _is_remote(text):
        raise UserError(f"{text!r} is a URL, not a path of this machine; {remedy}")
    if found := FILE.fullmatch(text):
        if found[1] not in (None, "", "localhost"):
            raise UserError(f"{text!r} names the machine {found[1]!r}; write file:///PATH")
        return found[2] if os.path.lexists(found[2]) else unquote(found[2])
    if os.path.lexists(text) and not text.startswith("~"):
        return text  # whatever is in its name
    text = VARIABLE.sub(_variable, text)
    home = os.path.expanduser(text)
    if home.startswith("~"):
        user = home[1:].partition("/")[0]
        raise UserError(f"{text!r}: there is no user {user!r} here; ./{text} is a file's name")
    return home


def _whole(text: str) -> str:
    """Return the text, if it can be a path at all."""
    if not text.strip():
        raise UserError(f"{text!r} is empty; give a path, or leave the flag out")
    if "\0" in text:
        raise UserError(f"{text!r} holds a zero byte, which no path does")
    if text != text.strip() and not os.path.lexists(text):
        raise UserError(f"{text!r} has blanks around it; leave them out")
    return text


def _is_remote(text: str) -> bool:
    return URL.match(text) is not None and FILE.fullmatch(text) is None


def _variable(found: re.Match[str]) -> str:
    name = found[1] or found[2]
    if name not in os.environ:
        raise UserError(
            f"{found.string!r}: there is no variable {name} in the environment; set it, or "
            "write the path out"
        )
    return os.environ[name]
