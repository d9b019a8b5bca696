"""Files that systems and programs leave beside pictures, which no source takes for data."""

from __future__ import annotations

import re

HIDDEN = "hidden or a system's file"  # the reason where a table or a list of names names one

# Of any part of a name, in lower case.
_NAMES = frozenset((
    "__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "lost+found",
    "$recycle.bin", "recycler", "system volume information", "network trash folder",
    "temporary items", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r",
    "__pycache__",
))  # fmt: skip
# Folders that are litter wherever they lie, unlike those above which somebody keeps his data.
_HIDDEN_FOLDERS = re.compile(
    r"\.(ipynb_checkpoints|thumbnails|thumb|trash.*|trashes|appledouble|spotlight-v100|fseventsd"
    r"|documentrevisions-v100|temporaryitems|picasaoriginals|git|svn|hg|dvc|idea|vscode)"
)
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]|[A-Za-z][A-Za-z0-9+.-]*://")


def is_litter(name: str) -> bool:
    """Is a part of this path, relative to its source, hidden or a system's own?

    Of an absolute path or a URL the folders that begin with a dot say where it lies (a cache below
    `~/.cache`), not what it is: there the known ones and the last part count.
    """
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
    hidden = parts[-1:] if _ABSOLUTE.match(name) else parts
    return any(part.startswith(".") for part in hidden) or any(
        part.lower() in _NAMES or _HIDDEN_FOLDERS.fullmatch(part.lower()) for part in parts
    )
