"""`--where`: a predicate over a row's metadata, in Python's syntax, of which no Python is run.

Logic is three-valued (Kleene's): what is said about a key that the row lacks, or about a value of
another type than the predicate expects, is unknown, and `not`, `and`, `or` treat it as such.
Unknown keeps the row; `has(key)` is for those who insist.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from shared.errors import UserError

DEPTH = 50  # of nested expressions


class Unknown:
    """The third truth value."""


UNKNOWN = Unknown()

Metadata = Mapping[str, Any]
Evaluate = Callable[[Metadata], Any]  # an expression's value for a row's metadata, or UNKNOWN
Binary = Callable[[Any, Any], Any]

ARITHMETIC: dict[type[ast.operator], Binary] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
ORDER: dict[type[ast.cmpop], Binary] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.NotEq: ast.Eq,
    ast.NotIn: ast.In,
    ast.IsNot: ast.Is,
}
FUNCTIONS = ("has", "len", "lower", "number")


class Where:
    """A predicate. Raises UserError, in one line, for what it does not understand."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self.tree = _parse(text)
            self._evaluate = compiled(self.tree)
        except ValueError as error:
            what = " ".join(str(error).split())
            raise UserError(
                f'--where {text!r}: {what}; for example: --where "similarity > 0.3"'
            ) from None

    def __reduce__(self) -> tuple[type[Where], tuple[str]]:
        return Where, (self.text,)

    def keeps(self, metadata: Metadata) -> bool:
        """Is the predicate true or unknown of this row?"""
        return _truth(self._evaluate(metadata)) is not False

    def is_known(self, metadata: Metadata) -> bool:
        """Is the predicate true or false of this row?"""
        return not isinstance(self._evaluate(metadata), Unknown)


def lookup(metadata: Metadata, name: str) -> Any:
    """Find the value under `name`, else under the same name in another case, else UNKNOWN.

    LAION writes WIDTH where img2dataset writes width. NaN is a missing value, as in pandas.
    """
    if name in metadata:
        value = metadata[name]
    else:
        keys = (key for key in metadata if isinstance(key, str) and key.lower() == name.lower())
        value = metadata.get(next(keys, ""), UNKNOWN)
    return UNKNOWN if isinstance(value, float) and math.isnan(value) else value


def key_of(node: ast.expr) -> str | None:
    """Name the key that `has(key)` or `has("key")` means."""
    if isinstance(node, ast.Name):
        return node.id
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _parse(text: str) -> ast.expr:
    """Parse the predicate. Raises ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{error.msg} (column {error.offset})") from None
    except (MemoryError, RecursionError) as error:
        raise ValueError(str(error) or "nested too deeply") from None


def compiled(node: ast.expr, depth: int = 0) -> Evaluate:
    """Turn an expression into a function of a row. Raises ValueError for what no predicate has."""
    if depth > DEPTH:
        raise ValueError("nested too deeply")

    def inner(child: ast.expr) -> Evaluate:
        return compiled(child, depth + 1)

    match node:
        case ast.Constant(value):
            if not isinstance(value, str | int | float | None):
                raise ValueError(f"{ast.unparse(node)} is neither number, string, True nor None")
            return lambda row: value
        case ast.Name(name):
            return lambda row: lookup(row, name)
        case ast.BoolOp(op, values):
            decisive, parts = isinstance(op, ast.Or), [inner(value) for value in values]
            return lambda row: _first_decisive(decisive, (_truth(part(row)) for part in parts))
        case ast.UnaryOp(ast.Not(), operand):
            negated = inner(operand)
            return lambda row: _not(_truth(negated(row)))
        case ast.UnaryOp(ast.USub() | ast.UAdd() as op, operand):
            sign, value_of = -1 if isinstance(op, ast.USub) else 1, inner(operand)
            return lambda row: _arithmetic(operator.mul, sign, value_of(row))
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            apply, first, second = ARITHMETIC[type(op)], inner(left), inner(right)
            return lambda row: _arithmetic(apply, first(row), second(row))
        case ast.Compare():
            return _comparison(node, inner)
        case ast.Call():
            return _call(node, inner)
        case ast.Tuple(elements) | ast.List(elements) | ast.Set(elements):
            parts = [inner(one) for one in elements]
            return lambda row: [part(row) for part in parts]
    raise ValueError(f"{ast.unparse(node)[:60]!r} is more than a predicate may hold")


def _truth(value: Any) -> bool | Unknown:
    return UNKNOWN if isinstance(value, Unknown) else bool(value)


def _not(truth: bool | Unknown) -> bool | Unknown:
    return truth if isinstance(truth, Unknown) else not truth


def _first_decisive(decisive: bool, truths: Iterable[bool | Unknown]) -> bool | Unknown:
    """Join truths: True decides an `or`, False an `and`."""
    unknown = False
    for truth in truths:
        if truth is decisive:
            return decisive
        unknown = unknown or isinstance(truth, Unknown)
    return UNKNOWN if unknown else not decisive


def _arithmetic(apply: Binary, left: Any, right: Any) -> Any:
    """Numbers with numbers; strings can be joined."""
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    strings = isinstance(left, str) and isinstance(right, str) and apply is operator.add
    if not (numbers or strings):
        return UNKNOWN
    try:
        result = apply(left, right)
    except ArithmeticError:  # division by zero, or too large
        return UNKNOWN
    return UNKNOWN if isinstance(result, float) and math.isnan(result) else result


def _call(node: ast.Call, inner: Callable[[ast.expr], Evaluate]) -> Evaluate:
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    if name not in FUNCTIONS:
        raise ValueError(f"there is no function {name}, only {', '.join(FUNCTIONS)}")
    if len(node.args) != 1 or node.keywords:
        raise ValueError(f"{name} takes one argument")
    if name == "has":
        key = key_of(node.args[0])
        if key is None:
            raise ValueError("has takes the name of a key: has(license)")
        return lambda row: not isinstance(lookup(row, key), Unknown)
    argument = inner(node.args[0])
    return lambda row: _applied(name, argument(row))


def _applied(name: str, value: Any) -> Any:
    if name == "number":
        return _number(value)
    if name == "len":
        return len(value) if isinstance(value, str | list | tuple | dict) else UNKNOWN
    return value.lower() if isinstance(value, str) else UNKNOWN


def _number(value: Any) -> Any:
    """Read a number, also one that is written as text, as in a CSV file."""
    if not isinstance(value, int | float | str):
        return UNKNOWN
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return UNKNOWN
    return UNKNOWN if math.isnan(number) else number


def _comparison(node: ast.Compare, inner: Callable[[ast.expr], Evaluate]) -> Evaluate:
    """Compile a chain such as `0.3 < similarity <= 1`, which is true where all its links are."""
    for op, right in zip(node.ops, node.comparators, strict=True):
        none = isinstance(right, ast.Constant) and right.value is None
        if isinstance(op, ast.Is | ast.IsNot) and not none:
            raise ValueError("`is` takes None only; use == instead")
    first = inner(node.left)
    links = [(type(op), inner(one)) for op, one in zip(node.ops, node.comparators, strict=True)]

    def truths(row: Metadata) -> Iterator[bool | Unknown]:
        left = first(row)
        for op, value_of in links:
            right = value_of(row)
            yield _link(op, left, right)
            left = right

    return lambda row: _first_decisive(False, truths(row))


def _link(op: type[ast.cmpop], left: Any, right: Any) -> bool | Unknown:
    if op in OPPOSITES:
        return _not(_link(OPPOSITES[op], left, right))
    if isinstance(left, Unknown) or isinstance(right, Unknown):
        return UNKNOWN
    if op is ast.In:
        return _contains(right, left)
    if op in (ast.Eq, ast.Is):
        return _equal(left, right)
    if _kind(left) != _kind(right) or _kind(left) not in (float, str):
        return UNKNOWN
    return bool(ORDER[op](left, right))


def _kind(value: Any) -> type:
    """Int, float and bool compare with each other, as in Python."""
    if isinstance(value, int | float):
        return float
    return list if isinstance(value, tuple) else type(value)


def _equal(left: Any, right: Any) -> bool | Unknown:
    """None is a value like others; otherwise equality of unlike types is a mistake: unknown."""
    if isinstance(left, Unknown) or isinstance(right, Unknown):
        return UNKNOWN
    if left is None or right is None:
        return left is right
    return bool(left == right) if _kind(left) == _kind(right) else UNKNOWN


def _contains(container: Any, item: Any) -> bool | Unknown:
    """`in`: part of a string, element of a list, key of an object."""
    if isinstance(container, str | dict):
        return item in container if isinstance(item, str) else UNKNOWN
    if not isinstance(container, list | tuple):
        return UNKNOWN
    return _first_decisive(True, (_equal(item, element) for element in container))
