"""Shell-style braces, as WebDataset users type them: `{00000..00099}.tar`, `{a,b}.tar`."""

from __future__ import annotations

import itertools

import braceexpand

from shared.errors import UserError

MANY = 1_000_000


def expand_braces(pattern: str, escapes: bool = True) -> list[str]:
    """All names that `pattern` stands for; `escapes`: may a backslash protect a brace?

    Raises UserError for unbalanced braces.
    """
    try:
        expanded = braceexpand.braceexpand(pattern, escape=escapes)
        names = list(itertools.islice(expanded, MANY + 1))
    except ValueError:  # its UnbalancedBracesError
        raise UserError(f"--shards: the braces of {pattern!r} do not match") from None
    if len(names) > MANY:
        raise UserError(f"--shards: {pattern!r} stands for more than {MANY} names; use a glob")
    return names
