"""MODULE:FUNCTION: measures of one's own."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import UserError, first_line, words_of
from shared.storage.reading import read_if_there


def load_function(flag: str, name: str, known: Iterable[str]) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION names. Raises UserError, with the ready names, for none."""
    module, _, function = name.partition(":")
    remedy = f"give {', '.join(known)} or MODULE:FUNCTION"
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{flag} {name}: {words_of(error)}; {remedy}") from None
    if not callable(found):
        raise UserError(f"{flag} {name}: it is no function; {remedy}")
    return guarded(flag, name, found)


def guarded(flag: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of somebody's, whose errors end the command in a line that says whose they are."""

    @functools.wraps(function)
    def called(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{flag} {name}: {type(error).__name__}: {first_line(error)} "
                f"({where.filename}, line {where.lineno})"
            ) from error

    return called


def source_hash(function: Callable[..., Any]) -> str | None:
    """A hash over the file that a function is written in, 16 hex digits; None where it has none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # it is not written in Python
        return None
    content = read_if_there(Path(file)) if file else None
    return None if content is None else hashlib.sha256(content).hexdigest()[:16]


def numbers(whose: str, values: Any) -> NDArray[np.float64]:
    """What a function gave, as an array. Raises UserError where it is no numbers."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{whose}: it gave no array of numbers ({first_line(error)})") from None
