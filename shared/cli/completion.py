"""Tab completion of the installed commands: `distillery-prep` and its like."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from typing import Annotated, Any, Union

import tyro

from shared.errors import UsageError

SHELLS = ("bash", "zsh", "fish")


def completion_script(
    prog: str, kinds: Mapping[str, type[Any]], shell: str, hidden: str = ""
) -> str:
    """Return what a shell evaluates to complete `prog`'s commands and flags, in bash paths as well.

    `kinds` are the dataclasses of the commands by name, of which the field `hidden` is no
    flag. Raises UsageError for another shell.
    """
    if shell not in SHELLS:
        raise UsageError(f"--print-completion {shell}: not one of {', '.join(SHELLS)}")
    commands = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.cli(Union[commands], args=["--tyro-print-completion", shell], prog=prog)  # type: ignore[call-overload]  # noqa: UP007
    lines = [
        _tidy(line, hidden) if "COMPLETION_SPEC = " in line else line
        for line in script.getvalue().splitlines(keepends=True)
    ]
    # Where nothing of ours begins so, it is a file's name.
    return "".join(lines).replace("complete -F", "complete -o default -F")


def _tidy(spec: str, hidden: str) -> str:
    """Return tyro's table of flags with each help text in one line, since a line is one completion.

    tyro lists suppressed fields, too; that of the name `hidden` is left out.
    """
    spec = re.sub(r"\\+n", " ", spec)
    return re.sub(rf", \{{'flags': \['--{hidden}'\][^{{}}]*\}}", "", spec)
