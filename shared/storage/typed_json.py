"""Records read back from JSON: dataclasses whose every value is of the type that they declare."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


class NewerRecord(ValueError):
    """The record has what this version does not know."""


def record_of(kind: type[T], value: Any, ignore_unknown: bool = False) -> T:
    """Return the dataclass `kind` from a JSON object.

    Lists become tuples where those are declared. Raises NewerRecord for fields that `kind` does
    not have, unless they are to be ignored, and ValueError for those that are missing or of another
    type.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r:.60} is no JSON object")
    hints, required = _declared(typing.cast(typing.Hashable, kind))
    unknown = sorted(value.keys() - hints.keys())
    if unknown and not ignore_unknown:
        raise NewerRecord(f"it has {unknown[0]!r:.60}, which is unknown here")
    if missing := sorted(required - value.keys()):
        raise ValueError(f"it has no {missing[0]!r}")
    known = {name: item for name, item in value.items() if name in hints}
    return kind(
        **{name: typed(item, hints[name], name, ignore_unknown) for name, item in known.items()}
    )


@cache
def _declared(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """Return the types of a dataclass's fields, and which of them have no default."""
    fields = dataclasses.fields(kind)
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    return typing.get_type_hints(kind), needed


def typed(value: Any, hint: Any, name: str, ignore_unknown: bool = False) -> Any:
    """Check that a JSON value is of the type `hint`. Raises ValueError, naming it, where it isn't.

    Numbers are finite, and whole ones no booleans. Records in it are built by `record_of`.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        kind = typing.cast(type[Any], hint)
        return value if isinstance(value, kind) else record_of(kind, value, ignore_unknown)
    if origin in (typing.Union, types.UnionType):
        if type(value) in inner:
            return value
        kind = next(one for one in inner if one is not type(None))
        return typed(value, kind, name, ignore_unknown)
    if origin in (tuple, list) and isinstance(value, list):
        return origin(typed(item, inner[0], name) for item in value)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {key: typed(item, inner[1], f"{name}.{key}") for key, item in value.items()}
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is hint:
        return value
    wanted = getattr(origin or hint, "__name__", str(hint))
    raise ValueError(f"{name:.60} is {value!r:.60}, not of type {wanted}")


def not_negative(**numbers: int) -> None:
    """Raise ValueError for a number below zero, naming it."""
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name} is {number}, below 0")


def inside(folder: str, name: str) -> str:
    """Return `name`, which is to be that of a file in `folder`, relative to the cache.

    Raises ValueError for any other, such as one that leads out of it.
    """
    start, _, file = name.partition("/")
    if start != folder or file in ("", ".", "..") or "/" in file or "\0" in file:
        raise ValueError(f"{name!r:.100} is no file in {folder}/")
    return name
