"""Names in `--shards`: globs, gaps in braces, and what of a glob's matches is meant."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence

from prep.files.litter import is_litter
from prep.sources.tables.open_dataset import HUB
from shared.cli.paths import local_text
from shared.errors import UserError
from shared.sanitize import printable

FILE = "file://"
TARS = (".tar", ".tgz", ".tar.gz", ".tar.zst")
SIDECAR = re.compile(r"(_stats\.json|\.parquet|\.json|\.txt|\.csv|\.idx)$")  # of a tar, in a glob


def refuse_gaps(names: Sequence[str], pattern: str) -> None:
    """Raise UserError where some of the local files that braces stand for are missing."""
    local = [name for name in names if not (is_url(name) or HUB.fullmatch(name) or _magic(name))]
    missing = [name for name in local if not os.path.lexists(local_path(name))]
    if missing and len(missing) < len(local):
        raise UserError(
            f"--shards: {len(missing)} of the {len(names)} files of {printable(pattern)!r} are "
            f"missing, such as {printable(missing[0])!r}; get them, or name those that there are: "
            "with a glob such as *.tar, or with several braces"
        )


def is_url(name: str) -> bool:
    """Is it the URL of a file or of several, rather than a path or a dataset of the hub?"""
    return "://" in name and HUB.fullmatch(name) is None and not name.startswith(FILE)


def local_path(name: str) -> str:
    """Turn a name in `--shards` into a path, as it stands if something has just that name."""
    remote = "://" in name and not name.startswith(FILE)
    return name if remote or os.path.lexists(name) else local_text(name)


def matches(name: str) -> list[str]:
    """Find the paths that a name stands for: itself, or what of a glob's matches is data."""
    path = local_path(name)
    if not _magic(name):
        return [path]
    folder, rest = _existing_folder(path)
    return without_sidecars(sorted(glob.glob(glob.escape(folder) + rest)))


def _magic(name: str) -> bool:
    """Is it a glob? Not if a file has just this name."""
    path = local_path(name)
    return glob.has_magic(_existing_folder(path)[1]) and not os.path.lexists(path)


def _existing_folder(path: str) -> tuple[str, str]:
    """Split after the longest beginning that is a folder as it stands (`[2024] trip`)."""
    folder = os.path.dirname(path)
    while folder and not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return folder, path[len(folder) :]


def without_sidecars(names: Sequence[str]) -> list[str]:
    """Keep what of a glob's names is data: no litter, and none of img2dataset's accounts.

    Those are STEM.parquet and STEM_stats.json, and any other STEM.json, .txt, .csv or .idx, beside
    a tar of that stem, or beside a folder of that stem which has such a STEM_stats.json.
    """
    kept = [name for name in names if not is_litter(name.rstrip("/").rpartition("/")[2])]
    folders = {name for name in kept if f"{name}_stats.json" in kept}
    stems = folders | {_tar_stem(name) for name in kept if _tar_stem(name)}
    return [
        name
        for name in kept
        if _tar_stem(name) or SIDECAR.sub("", name) == name or SIDECAR.sub("", name) not in stems
    ]


def _tar_stem(name: str) -> str:
    ending = next((end for end in TARS if name.endswith(end)), "")
    return name.removesuffix(ending) if ending else ""
