"""Which rows a folder has: those of its metadata, else its pictures with the captions beside them.

Links are the user's own and are followed; what metadata names must lie in the folder.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prep.files.litter import HIDDEN, is_litter
from prep.images.kinds import HEAD_BYTES, kind_of
from prep.rows.character_encoding import UnreadableText, decode_text
from prep.rows.row import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    LONG_CAPTION,
    METADATA_EXTENSION,
    TEXT_BYTES,
)
from prep.sources.folders.metadata import FILE_NAME, JSON_LIST, LISTS, read_list
from prep.sources.folders.tree import Level, walk

OUTSIDE = "outside the folder"
MISSING = "file missing"
# Never pictures, whatever lies beside them: captions, notes, and what trainers keep of a picture.
BESIDE = frozenset((
    *CAPTION_EXTENSIONS, METADATA_EXTENSION, "jsonl", "csv", "tsv", "md", "html", "htm", "xml",
    "xmp", "aae", "yaml", "yml", "toml", "ini", "log", "py", "sh", "npz", "npy", "safetensors",
    "pt", "pth", "ckpt", "tar", "tgz", "zst", "gz", "zip", "parquet", "arrow",
))  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A row of a folder before its picture is read."""

    row: Mapping[str, Any]  # with `file_name`, its key
    path: str = ""  # of its picture within the folder; empty where there is none
    problem: str = ""
    json: str = ""  # the NAME.json beside the picture
    listed: bool = False  # in metadata
    text_only: bool = False  # from a CSV, which has no numbers

    @property
    def name(self) -> str:
        """The row's key."""
        return str(self.row[FILE_NAME])

    @property
    def may_have_caption(self) -> bool:
        """Is it listed, or does anything lie beside it?"""
        return self.listed or bool(self.json or self.problem) or "text" in self.row


def list_folder(root: Path, encoding: str | None) -> list[Member]:
    """List the rows by name, also those without captions. Raises UserError for bad metadata."""
    finder = Finder(root)
    members = [one for level in walk(root, LISTS) for one in _members(finder, level, encoding)]
    return sorted(members, key=lambda member: member.name)


def _members(finder: Finder, level: Level, encoding: str | None) -> list[Member]:
    root = finder.root
    for name in LISTS:
        if name in level.names:
            return _listed(finder, level.path, name, encoding)
    beside = [_beside(root, level, name, encoding) for name in _pictures(root, level)]
    if JSON_LIST in level.names and not any("text" in one.row or one.problem for one in beside):
        return _listed(finder, level.path, JSON_LIST, encoding)
    return beside


def _listed(finder: Finder, folder: str, name: str, encoding: str | None) -> list[Member]:
    rows = read_list(finder.root / folder / name, encoding)
    members, text_only = [], not name.startswith("metadata.json")
    for row in rows:
        path, problem = _place(finder, folder, row[FILE_NAME])
        # Keys of the lists of several folders differ as their pictures' places do.
        row = row if folder == "" else {**row, FILE_NAME: folder + row[FILE_NAME]}
        members.append(Member(row, path, problem, listed=True, text_only=text_only))
    return members


def _pictures(root: Path, level: Level) -> Iterator[str]:
    """Names that stand for a row, told by content where the extension is no picture's.

    Those are: pictures; and whatever else has a caption and no picture of its name beside it.
    """
    for name in level.names + level.folders:
        stem, extension = os.path.splitext(name)
        extension, captioned = extension[1:].lower(), bool(level.beside(name, *CAPTION_EXTENSIONS))
        if name in level.folders:
            if extension in IMAGE_EXTENSIONS and captioned:
                yield name  # whose caption would be lost without a word
        elif extension in IMAGE_EXTENSIONS or (
            extension not in BESIDE
            and not any(one in IMAGE_EXTENSIONS for one in level.stems[stem])
            and (captioned or _is_picture(root / level.path / name))
        ):
            yield name


def _is_picture(path: Path) -> bool:
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            return False
        with path.open("rb") as file:
            kind = kind_of(file.read(HEAD_BYTES))
    except OSError:
        return False
    return kind is not None and kind.is_picture


def _beside(root: Path, level: Level, name: str, encoding: str | None) -> Member:
    path = level.path + name
    row: dict[str, Any] = {FILE_NAME: path}
    problem = ""
    if caption := level.beside(name, *CAPTION_EXTENSIONS):
        text, problem = _caption_in(root / level.path / caption, encoding)
        if text is not None:
            row["text"] = text
    record = level.beside(name, METADATA_EXTENSION)
    return Member(row, path, problem, record and level.path + record)


def _caption_in(path: Path, encoding: str | None) -> tuple[str | None, str]:
    """Read the text of a file, or say why there is none; nothing of either where it is no file."""
    try:
        if not path.is_file():
            return None, ""
        with path.open("rb") as file:
            data = file.read(TEXT_BYTES + 1)
    except OSError as error:
        return None, f"its {path.suffix[1:]} cannot be read ({error.strerror})"
    if len(data) > TEXT_BYTES:
        return None, LONG_CAPTION
    try:
        return decode_text(data, encoding).strip(), ""
    except UnreadableText as error:
        return None, f"its {path.suffix[1:]} is {error}"


def _place(finder: Finder, folder: str, name: str) -> tuple[str, str]:
    """Where a picture that metadata names is, or why it has no place."""
    path = inside(finder.root, folder, name)
    if path is None and "\\" not in name:
        return "", OUTSIDE
    if path is None or not _exists(finder.root, path):
        path = finder.find(folder, name)
    if path is None:
        return "", MISSING
    return path, HIDDEN if is_litter(path) else ""


def inside(root: Path, folder: str, name: str) -> str | None:
    """Where `name` in `folder` leads, within `root`; None where that is outside.

    Told by the words alone: links are followed later, `..` never through one.
    """
    top = os.path.abspath(root)
    for base in dict.fromkeys((top, os.path.realpath(top))):  # an absolute name may use either
        found = os.path.normpath(os.path.join(base, folder, name))
        if found == base or found.startswith(base.rstrip("/") + "/"):
            return os.path.relpath(found, base)
    return None


def _exists(root: Path, path: str) -> bool:
    try:
        return os.path.lexists(root / path)
    except ValueError:  # a NUL, or what no file system can name
        return False


@dataclass
class Finder:
    """Finds the one file that a name means though it is written otherwise."""

    root: Path

    def find(self, folder: str, name: str) -> str | None:
        """Its path, where exactly one file could be meant.

        Tried in this order: with slashes for backslashes, without regard to case and to how
        accents are composed; below the folders that `folder` itself ends in; without extension.
        """
        wanted = _plain(name.strip())
        parts = wanted.split("/")
        base = [part for part in (*self.root.resolve().parts, *folder.split("/")) if part]
        plain = [_plain(part) for part in base]
        tails = ["/".join(parts[n:]) for n in range(1, len(parts)) if parts[:n] == plain[-n:]]
        prefix = _plain(folder)
        for index in self._indices:
            for tail in (wanted, *tails):
                if len(found := index.get(prefix + tail, ())) == 1:
                    return found[0]
        return None

    @cached_property
    def _indices(self) -> tuple[Mapping[str, Sequence[str]], ...]:
        """The tree's files by their whole names and, of pictures, by those without extensions."""
        whole: dict[str, list[str]] = defaultdict(list)
        bare: dict[str, list[str]] = defaultdict(list)
        for level in walk(self.root):
            for name in level.names:
                path = level.path + name
                whole[_plain(path)].append(path)
                stem, extension = os.path.splitext(path)
                if extension[1:].lower() in IMAGE_EXTENSIONS:
                    bare[_plain(stem)].append(path)
        return whole, bare


def _plain(name: str) -> str:
    name = unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()
    return name.removeprefix("./")
