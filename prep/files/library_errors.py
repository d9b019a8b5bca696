"""Whose an exception is: what a library tells of the world, or a mistake of this project's code.

Libraries fail in more ways than they document, above all where a damaged file or a server's answer
is not what they expect. A mistake of ours is to be seen as one: never retried, never put down to
the user's data.
"""

from __future__ import annotations

import traceback

from shared.storage.errors import is_mistake


def raised_in(error: BaseException, *packages: str) -> bool:
    """Did it pass through the code of one of these packages?"""
    return any(
        str(frame.f_globals.get("__name__")).partition(".")[0] in packages
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def is_failure(error: BaseException) -> bool:
    """Does it say that a file cannot be had? File systems raise OSErrors, and what theirs do."""
    if isinstance(error, OSError):
        return True
    return raised_in(error, "fsspec") and not is_mistake(error)
