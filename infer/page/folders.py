"""What the page may show: what lies under its folders, by its name there.

A name that a browser sends is looked up in such a list, so it can name nothing else. Links that
lead out of a folder are left out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open

from infer.config import PageConfig
from infer.pipelines.students import Student, open_student
from shared.errors import UserError
from shared.models.family import model_name
from shared.sanitize import printable, visible

T = TypeVar("T")

DEPTH = 2  # of folders in folders: runs/learned/cat is found
SHOWN = 60  # characters of a name in a list
INDEX, RUN, CACHE = "model_index.json", "config.json", "identity.json"


@dataclass(frozen=True)
class Folders:
    """The folders that the page was opened on."""

    runs: Path
    caches: Path
    models: tuple[str, ...]  # as they were typed

    @staticmethod
    def of(config: PageConfig) -> Folders:
        """The folders that the flags name."""
        return Folders(config.runs, config.caches, config.models)

    def trainings(self) -> dict[str, Path]:
        """All runs, also those without a student yet."""
        return named(self.runs, found(self.runs, is_run))

    def students(self) -> dict[str, Student]:
        """Runs and exports that have a student."""
        students = {}
        for folder in found(self.runs, is_run_or_export):
            with contextlib.suppress(UserError, OSError):  # a run under way, or a damaged one
                students[folder] = open_student(folder)
        return {name: students[folder] for name, folder in named(self.runs, students).items()}

    def all_caches(self) -> dict[str, Path]:
        """Caches, also unfinished ones."""
        return named(self.caches, found(self.caches, lambda one: (one / CACHE).is_file()))

    def all_models(self) -> dict[str, str]:
        """What `--models` names, and the teachers of the runs that are on this machine."""
        models = dict[str, str]()
        for text in self.models:
            for source in models_in(Path(text)) if is_shelf(text) else [text]:
                models.setdefault(model_name(source), source)
        for student in self.students().values():
            with contextlib.suppress(UserError):
                source = student.teacher(None)
                models.setdefault(model_name(source), source)
        return models

    def loras(self) -> dict[str, Path]:
        """LoRA students under the runs, and LoRA files beside the models."""
        loras = {name: one.folder for name, one in self.students().items() if one.lora}
        for folder in (Path(text) for text in self.models if is_shelf(text)):
            for name, file in named(folder, filter(is_lora, files_in(folder))).items():
                loras.setdefault(name, file)
        return loras


def is_run(folder: Path) -> bool:
    """Is this the folder of a training?"""
    return (folder / RUN).is_file() and not (folder / INDEX).exists()


def is_run_or_export(folder: Path) -> bool:
    """Could there be a student in it?"""
    return is_run(folder) or (folder / "scheduler").is_dir()


def is_shelf(text: str) -> bool:
    """Is this a folder with models in it, rather than a model?"""
    return Path(text).is_dir() and not (Path(text) / INDEX).is_file()


def models_in(folder: Path) -> list[str]:
    """Models in diffusers' format, and single files that are no LoRAs."""
    folders = found(folder, lambda one: (one / INDEX).is_file())
    files = (file for file in files_in(folder) if not is_lora(file))
    return [*map(str, folders), *map(str, files)]


def files_in(folder: Path) -> list[Path]:
    """Files of weights that lie in a folder itself."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if file.is_file() and is_inside(file, folder)]


def is_lora(file: Path) -> bool:
    """Do the names of a file's tensors say that it is a LoRA?"""
    with contextlib.suppress(SafetensorError, OSError), safe_open(file, "np") as weights:
        return any("lora" in name.lower() for name in weights.keys())  # noqa: SIM118
    return False


def found(root: Path, wanted: Callable[[Path], bool], depth: int = DEPTH) -> Iterator[Path]:
    """Folders of one kind: `root` itself, or those in it; nothing where it cannot be read."""
    pending = [(root, 0)]
    while pending:
        folder, level = pending.pop()
        if wanted(folder):
            yield folder
        elif level < depth:
            with contextlib.suppress(OSError):
                names = sorted(one.name for one in os.scandir(folder) if one.is_dir())
                inner = [folder / name for name in names if not name.startswith(".")]
                pending += [(one, level + 1) for one in reversed(inner) if is_inside(one, root)]


def is_inside(path: Path, root: Path) -> bool:
    """Does a path stay under a folder, wherever its links lead?"""
    return path.resolve().is_relative_to(root.resolve())


def named(root: Path, paths: Iterator[Path] | Mapping[Path, object]) -> dict[str, Path]:
    """Paths by their names under a folder, as text that a browser can send back."""
    return {
        printable(str(one.relative_to(root) if one != root else root.resolve().name)): one
        for one in paths
    }


def chosen(name: object, listed: Mapping[str, T], what: str) -> T:
    """What a name that came from a browser stands for. Raises UserError for one of no list."""
    if not isinstance(name, str) or not name:
        raise UserError(f"choose a {what} first")
    if name not in listed:
        raise UserError(
            f"there is no {what} {visible(name, SHOWN)!r} in the page's folders; choose from the "
            "list, or load the page again"
        )
    return listed[name]


def choices(names: Mapping[str, object]) -> list[tuple[str, str]]:
    """Labels and values for a list, in which a name shows as it is."""
    return [(visible(name, SHOWN), name) for name in names]
