"""What an archive of a cache looks like, for those who write and those who read it.

ARCHIVE/
shards/NAME.tar.zst     each shard, compressed by itself
samples/ units/ *.json  and conditioning.safetensors: as they are in the cache
SHA256SUMS              of all these, written last: `sha256sum -c SHA256SUMS` checks them
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from shared.errors import UserError
from shared.storage.reading import read_file
from shared.storage.urls import Place
from shared.wording import counted

SUMS = "SHA256SUMS"
SUFFIX = ".zst"
# The only names an archive may hold: nothing that leads out of the folder.
_NAME = r"[^/\\\0\n]+"
ALLOWED = re.compile(
    rf"(identity\.json|manifest\.json|holdout\.json|conditioning\.safetensors"
    rf"|units/{_NAME}\.json|samples/{_NAME}\.parquet|shards/{_NAME}\.tar\.zst)"
)


def write_sums(sums: dict[str, str]) -> bytes:
    """Format the content of SHA256SUMS as coreutils do."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()


def refuse_names(names: Iterable[str]) -> None:
    """Raise UserError for a name that `read_sums` would refuse."""
    for name in names:
        if not ALLOWED.fullmatch(name):
            raise UserError(
                f"{name!a} cannot be a name in an archive; run the same `prep encode` again, which "
                "gives that unit a plainer one"
            )


def read_sums(archive: Path) -> dict[str, str]:
    """Digest by name. Raises UserError where the archive is unfinished or names other files."""
    path = archive / SUMS
    if not path.is_file():
        raise UserError(
            f"{archive} is not a finished archive (no {SUMS}); run the same `prep pack` again"
        )
    sums: dict[str, str] = {}
    # A name may hold what splitlines() takes for the end of a line.
    lines = read_file(path).decode("utf-8", "replace").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        digest, _, name = line.partition("  ")
        if not re.fullmatch(r"[0-9a-f]{64}", digest) or not ALLOWED.fullmatch(name):
            raise UserError(f"{path} line {number} is not of a `prep pack` archive; copy it again")
        sums[name] = digest
    return sums


def refuse_strangers(folder: Place, known: set[str], other: Place, flag: str) -> None:
    """Raise UserError where the folder holds records of units that `other` does not have."""
    names = {path.name for path in (folder / "units").glob("*.json")}
    if extra := sorted(names - known):
        raise UserError(
            f"{folder} holds {counted(len(extra), 'unit')} that {other} does not "
            f"(first: {extra[0]}); choose another {flag}"
        )
