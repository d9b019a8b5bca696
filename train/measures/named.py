"""MODULE:FUNCTION: measures of one's own."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shared.errors import UserError, words_of
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
    return found  # type: ignore[no-any-return]


def source_hash(function: Callable[..., Any]) -> str | None:
    """A hash over the file that a function is written in, 16 hex digits; None where it has none."""
    try:
        file = inspect.getsourcefile(function)
    except TypeError:  # it is not written in Python
        return None
    content = read_if_there(Path(file)) if file else None
    return None if content is None else hashlib.sha256(content).hexdigest()[:16]
