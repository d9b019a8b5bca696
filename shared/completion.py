"""Tab completion of the installed commands, `distillery-prep` and `distillery-train`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Annotated, Any, Union

import tyro

from shared.errors import UsageError

SHELLS = ("bash", "zsh", "fish")


def completion_script(prog: str, kinds: Mapping[str, type[Any]], shell: str) -> str:
    """What a shell evaluates to complete `prog`'s commands and their flags, in bash paths as well.

    `kinds` are the dataclasses of the commands by name. Raises UsageError for another shell.
    """
    if shell not in SHELLS:
        raise UsageError(f"--print-completion {shell}: not one of {', '.join(SHELLS)}")
    commands = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.cli(Union[commands], args=["--tyro-print-completion", shell], prog=prog)  # type: ignore[call-overload]  # noqa: UP007
    # Where nothing of ours begins so, it is a file's name.
    return script.getvalue().replace("complete -F", "complete -o default -F")
