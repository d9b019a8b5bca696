"""`--where`: a predicate over a row's metadata, in Python's syntax, evaluated by hand.

Logic is three-valued (Kleene's): what is said about a key that the row lacks, or about a value of
another type than the predicate expects, is unknown, and `not`, `and`, `or` treat it as such.
Unknown keeps the row; `has(key)` is for those who insist.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shared.errors import UserError

DEPTH = 50  # of nested expressions


class Unknown:
    """The third truth value."""


UNKNOWN = Unknown()

ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
ORDER: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
FUNCTIONS = ("has", "len", "lower", "number")


@dataclass(frozen=True)
class Where:
    """A checked predicate. Raises UserError, in one line, for what it does not understand."""

    text: str

    def __post_init__(self) -> None:
        _check(self.tree, self.text)

    @cached_property
    def tree(self) -> ast.expr:
        """The parsed expression."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                return ast.parse(self.text.strip(), mode="eval").body
        except SyntaxError as error:
            raise _mistake(self.text, f"{error.msg} (column {error.offset})") from None
        except (ValueError, MemoryError, RecursionError) as error:
            raise _mistake(self.text, str(error) or "nested too deeply") from None

    def keeps(self, metadata: Mapping[str, Any]) -> bool:
        """Is the predicate true or unknown of this row?"""
        return _truth(_value(self.tree, metadata)) is not False


def is_known(part: ast.expr, metadata: Mapping[str, Any]) -> bool:
    """Is a part of a predicate true or false of this row?"""
    return not isinstance(_truth(_value(part, metadata)), Unknown)


def lookup(metadata: Mapping[str, Any], name: str) -> Any:
    """The value under `name`, else under the same name in another case, else UNKNOWN.

    LAION writes WIDTH where img2dataset writes width. NaN is a missing value, as in pandas.
    """
    if name in metadata:
        value = metadata[name]
    else:
        keys = (key for key in metadata if isinstance(key, str) and key.lower() == name.lower())
        value = metadata.get(next(keys, ""), UNKNOWN)
    return UNKNOWN if isinstance(value, float) and math.isnan(value) else value


def _mistake(text: str, what: str) -> UserError:
    what = " ".join(what.split())
    return UserError(f'--where {text!r}: {what}; for example: --where "similarity > 0.3"')


def _check(node: ast.expr, text: str, depth: int = 0) -> None:
    """Raise UserError for anything that `_value` has no answer to."""
    if depth > DEPTH:
        raise _mistake(text, "nested too deeply")
    children: Sequence[ast.expr] = ()
    if isinstance(node, ast.Call):
        children = _check_call(node, text)
    elif isinstance(node, ast.Constant):
        if not isinstance(node.value, str | int | float | None):
            raise _mistake(text, f"{ast.unparse(node)} is neither number, string, True nor None")
    elif isinstance(node, ast.BoolOp):
        children = node.values
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Invert):
        children = [node.operand]
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        children = [node.left, node.right]
    elif isinstance(node, ast.Compare):
        children = [node.left, *node.comparators]
        for op, right in zip(node.ops, node.comparators, strict=True):
            none = isinstance(right, ast.Constant) and right.value is None
            if isinstance(op, ast.Is | ast.IsNot) and not none:
                raise _mistake(text, "`is` takes None only; use == instead")
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        children = node.elts
    elif not isinstance(node, ast.Name):
        raise _mistake(text, f"{ast.unparse(node)[:60]!r} is more than a predicate may hold")
    for child in children:
        _check(child, text, depth + 1)


def _check_call(node: ast.Call, text: str) -> Sequence[ast.expr]:
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    if name not in FUNCTIONS:
        raise _mistake(text, f"there is no function {name}, only {', '.join(FUNCTIONS)}")
    if len(node.args) != 1 or node.keywords:
        raise _mistake(text, f"{name} takes one argument")
    if name == "has" and key_of(node.args[0]) is None:
        raise _mistake(text, "has takes the name of a key: has(license)")
    return node.args


def key_of(node: ast.expr) -> str | None:
    """The key that `has(key)` or `has("key")` means."""
    if isinstance(node, ast.Name):
        return node.id
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _value(node: ast.expr, row: Mapping[str, Any]) -> Any:
    """What an expression comes to for a row; UNKNOWN where that cannot be said."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return lookup(row, node.id)
    if isinstance(node, ast.BoolOp):
        return _bool_op(node, row)
    if isinstance(node, ast.UnaryOp):
        return _unary(node.op, _value(node.operand, row))
    if isinstance(node, ast.Compare):
        return _compare(node, row)
    if isinstance(node, ast.Call):
        return _call(node, row)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, row), _value(node.right, row)
        return _arithmetic(ARITHMETIC[type(node.op)], left, right)
    assert isinstance(node, ast.Tuple | ast.List | ast.Set)
    return [_value(one, row) for one in node.elts]


def _truth(value: Any) -> bool | Unknown:
    return UNKNOWN if isinstance(value, Unknown) else bool(value)


def _bool_op(node: ast.BoolOp, row: Mapping[str, Any]) -> bool | Unknown:
    decisive = isinstance(node.op, ast.Or)  # True decides an `or`, False an `and`
    unknown = False
    for part in node.values:
        truth = _truth(_value(part, row))
        if truth is decisive:
            return decisive
        unknown = unknown or isinstance(truth, Unknown)
    return UNKNOWN if unknown else not decisive


def _unary(op: ast.unaryop, value: Any) -> Any:
    if isinstance(op, ast.Not):
        truth = _truth(value)
        return truth if isinstance(truth, Unknown) else not truth
    if not isinstance(value, int | float):
        return UNKNOWN
    return -value if isinstance(op, ast.USub) else +value


def _arithmetic(apply: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
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


def _call(node: ast.Call, row: Mapping[str, Any]) -> Any:
    assert isinstance(node.func, ast.Name)
    if node.func.id == "has":
        return not isinstance(lookup(row, key_of(node.args[0]) or ""), Unknown)
    value = _value(node.args[0], row)
    if node.func.id == "number":
        return _number(value)
    if node.func.id == "len":
        return len(value) if isinstance(value, str | list | tuple | dict) else UNKNOWN
    return value.lower() if isinstance(value, str) else UNKNOWN


def _number(value: Any) -> Any:
    """A number, also one that is written as text, as in a CSV file."""
    if not isinstance(value, int | float | str):
        return UNKNOWN
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return UNKNOWN
    return UNKNOWN if math.isnan(number) else number


def _compare(node: ast.Compare, row: Mapping[str, Any]) -> bool | Unknown:
    """A chain such as `0.3 < similarity <= 1` is true where all its links are."""
    left, unknown = _value(node.left, row), False
    for op, part in zip(node.ops, node.comparators, strict=True):
        right = _value(part, row)
        answer = _link(op, left, right)
        if answer is False:
            return False
        unknown, left = unknown or isinstance(answer, Unknown), right
    return UNKNOWN if unknown else True


def _link(op: ast.cmpop, left: Any, right: Any) -> bool | Unknown:
    if isinstance(op, ast.NotEq | ast.NotIn | ast.IsNot):
        opposites: dict[type[ast.cmpop], ast.cmpop] = {
            ast.NotEq: ast.Eq(), ast.NotIn: ast.In(), ast.IsNot: ast.Is(),
        }  # fmt: skip
        answer = _link(opposites[type(op)], left, right)
        return answer if isinstance(answer, Unknown) else not answer
    if isinstance(left, Unknown) or isinstance(right, Unknown):
        return UNKNOWN
    if isinstance(op, ast.In):
        return _contains(right, left)
    if isinstance(op, ast.Eq | ast.Is):
        return _equal(left, right)
    if _kind(left) != _kind(right) or _kind(left) not in (float, str):
        return UNKNOWN
    return bool(ORDER[type(op)](left, right))


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
    if isinstance(container, str):
        return item in container if isinstance(item, str) else UNKNOWN
    if isinstance(container, dict):
        return item in container if isinstance(item, str) else UNKNOWN
    if not isinstance(container, list | tuple):
        return UNKNOWN
    answers = [_equal(item, element) for element in container]
    if True in answers:
        return True
    return UNKNOWN if any(isinstance(answer, Unknown) for answer in answers) else False
