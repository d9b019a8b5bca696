"""Do the rows have what the filters ask about? A misspelt key would let everything through."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import islice
from typing import Any

from prep.filters.filters import Filters
from prep.filters.where import Unknown, Where, key_of, lookup
from prep.rows.row import Row, SourceError
from prep.rows.unit import Unit
from shared.errors import UserError

UNITS, UNIT_ROWS = 16, 64  # looked at before a filter that decides nothing is refused
SHOWN_KEYS = 24
PWATERMARK = "pwatermark"


class Evidence:
    """What was seen of the rows' metadata, and which parts of the filters decided nothing yet.

    What `has(key)` asks about may be missing: whoever writes it knows that it is.
    """

    def __init__(self, filters: Filters) -> None:
        self.filters = filters
        self.rows = 0
        self.keys: dict[str, Any] = {}  # with a value of each
        self.undecided: list[tuple[str, Where]] = []  # flag and part
        if filters.where is not None:
            where = Where(filters.where)
            spared = {key.lower() for key in _asked_for(where.tree)}
            self.undecided += [
                (f"--where {filters.where!r}", Where(ast.unparse(part)))
                for part in _parts(where.tree)
                if spared.isdisjoint(name.lower() for name in _names_in(part))
            ]
        if filters.max_pwatermark is not None:
            flag = f"--max-pwatermark {filters.max_pwatermark:g}"
            self.undecided.append((flag, Where(f"{PWATERMARK} > {filters.max_pwatermark}")))

    def noting(self, rows: Iterable[Row]) -> Generator[Row, None, None]:
        """Yield the rows, each looked at."""
        for row in rows:
            self.note(row.metadata)
            yield row

    def note(self, metadata: Mapping[str, Any]) -> None:
        """Look at a row."""
        self.rows += 1
        for key, value in metadata.items():
            if self.keys.get(key) is None:
                self.keys[key] = value
        self.undecided = [one for one in self.undecided if not one[1].is_known(metadata)]

    def insist(self, units: Sequence[Unit]) -> None:
        """Raise UserError where a part of the filters decides nothing in any row looked at.

        Before that the beginnings of other units are looked at, which may have other keys.
        """
        self.rows = 0  # they are read again
        for unit in units[:: max(1, len(units) // UNITS)]:
            if not self.undecided:
                return
            with suppress(SourceError), closing(unit.rows()) as rows:  # damage is told elsewhere
                for row in islice(rows, UNIT_ROWS):
                    self.note(row.metadata)
        if self.undecided:
            raise UserError(self._refusal(self.undecided[0][0], self.undecided[0][1].tree))

    def _refusal(self, flag: str, part: ast.expr) -> str:
        there = {key.lower() for key in self.keys}
        seen = f"the {self.rows} rows looked at"
        missing = [name for name in dict.fromkeys(_names_in(part)) if name.lower() not in there]
        if missing:
            keys = ", ".join(list(self.keys)[:SHOWN_KEYS]) or "no keys at all"
            more = ", ..." if len(self.keys) > SHOWN_KEYS else ""
            near = difflib.get_close_matches(missing[0], self.keys, 1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            return (
                f"{flag}: none of {seen} has {', '.join(missing)}{meant}, so that all would be "
                f"kept; they have {keys}{more}. {self._remedy(missing[0], part)}"
            )
        kinds = ", ".join(self._kind(name) for name in dict.fromkeys(_names_in(part)))
        return (
            f"{flag}: {ast.unparse(part)!r} is neither true nor false of any of {seen}, so that "
            f"it would keep them all: {kinds}"
        )

    def _remedy(self, name: str, part: ast.expr) -> str:
        if name == PWATERMARK and self.filters.max_pwatermark is not None:
            return "Leave the flag out"
        return f"Where others have it, say so: not has({name}) or {ast.unparse(part)}"

    def _kind(self, name: str) -> str:
        """Of which type the values of a key are, and how text becomes a number."""
        value = lookup(self.keys, name)
        if isinstance(value, str):
            return f"{name} is text, such as {value[:40]!r}; number({name}) makes a number of it"
        if isinstance(value, Unknown):
            return f"{name} is not a number"
        kind = {type(None): "null", dict: "an object", list: "a list"}.get(type(value))
        return f"{name} is {kind or f'such as {value!r}'}"


def _parts(node: ast.expr) -> Iterator[ast.expr]:
    """Yield what `and`, `or` and `not` join: each is true, false or unknown of a row by itself."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _parts(value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield from _parts(node.operand)
    else:
        yield node


def _names_in(part: ast.expr) -> list[str]:
    """List the keys that a part speaks of, but for those that `has` asks for."""
    if isinstance(part, ast.Call):
        return [] if _is_has(part) else [name for one in part.args for name in _names_in(one)]
    if isinstance(part, ast.Name):
        return [part.id]
    inner = (one for one in ast.iter_child_nodes(part) if isinstance(one, ast.expr))
    return [name for one in inner for name in _names_in(one)]


def _asked_for(tree: ast.expr) -> list[str]:
    """List the keys that `has` asks for."""
    calls = (one for one in ast.walk(tree) if isinstance(one, ast.Call) and _is_has(one))
    return [key_of(call.args[0]) or "" for call in calls]


def _is_has(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "has"
