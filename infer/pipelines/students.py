"""Trained students: the folders of runs, and of exports that came from elsewhere."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from infer.pipelines.sampling import Sampling, sampling_of, sampling_of_run
from shared.cache.conditioning import load_conditioning
from shared.cache.identity import Identity, read_identity
from shared.cache.paths import CachePaths
from shared.errors import UserError
from shared.models.family import SCHEDULER_CONFIG, recorded_model, resolve_model
from shared.storage.files import load_record
from shared.storage.urls import RemotePlace
from train.config import RunConfig
from train.export.kohya import KOHYA_FILE
from train.export.student import written_student
from train.export.weights import LORA_FILE, UNET_FOLDER
from train.state.run_config import run_config

MAX_PROMPTS = 4  # of those that a cache has for previews


@dataclass(frozen=True)
class Student:
    """A trained student on disk."""

    folder: Path
    weights: Path  # a LoRA's file, or the folder of a UNet
    config: RunConfig | None  # None for an export without its run

    @property
    def lora(self) -> bool:
        """Is it a LoRA? Otherwise a UNet."""
        return self.weights.name != UNET_FOLDER

    def teacher(self, model: str | None) -> str:
        """Where its teacher is: `model` if given, else as its run recorded it.

        Raises UserError where that is not known, or not on this machine.
        """
        if model is not None:
            return model
        if self.config is None:
            raise UserError(
                f"{self.folder} is an export without its run's config.json, which names the "
                "model; say --model"
            )
        return recorded_model(self.config.model)

    def sampling(self, model: str) -> Sampling:
        """How it is drawn on this `model`."""
        known = resolve_model(model)
        if self.config is not None:
            return sampling_of_run(self.config, known)
        scheduler = load_record(self.folder / SCHEDULER_CONFIG, dict, "fetch the export anew")
        return sampling_of(str(self.folder), scheduler, self.is_told(), known.family)

    def is_told(self) -> bool:
        """Is its UNet told the guidance?"""
        return not self.lora and unet_config_of(self.weights).get("time_cond_proj_dim") is not None


def unet_config_of(folder: Path) -> dict[str, Any]:
    """The configuration of an exported UNet."""
    return load_record(folder / "config.json", dict, "fetch the export anew")


def open_student(folder: Path) -> Student:
    """Find the student of a run or of an export.

    Raises UserError where there is none; a mistyped name comes with the nearest.
    """
    if not folder.exists():
        raise UserError(f"--run {folder} is not there{nearest(folder)}")
    if folder.name == UNET_FOLDER and (folder.parent / SCHEDULER_CONFIG).is_file():
        raise UserError(f"--run {folder} is the UNet of a student; give --run {folder.parent}")
    if (folder / "config.json").is_file() and not (folder / "model_index.json").exists():
        config = run_config(folder)
        return Student(folder, written_student(folder, config), config)
    if (folder / SCHEDULER_CONFIG).is_file():
        for name in (LORA_FILE, UNET_FOLDER):
            if (folder / name).exists() and not (folder / "model_index.json").exists():
                return Student(folder, folder / name, None)
    remedy = "give the folder that `train distill` or `train export` wrote"
    if (folder / "model_index.json").exists():
        remedy = f"it is a whole model: --model {folder}"
    raise UserError(f"--run {folder} holds no student; {remedy}")


def student_beside(file: Path) -> Student | None:
    """The LoRA student that a file is the export of; None for a LoRA from elsewhere."""
    if file.name not in (LORA_FILE, KOHYA_FILE) or not (file.parent / SCHEDULER_CONFIG).is_file():
        return None
    config = None
    if (file.parent / "config.json").is_file():
        config = run_config(file.parent)
    return Student(file.parent, file, config)


def refuse_run(model: str) -> None:
    """Raise UserError for a run in a model's place."""
    folder = Path(model)
    try:
        run_config(folder)
    except UserError:  # something else's configuration, or none
        return
    raise UserError(f"--model {model} is a run; give --run {model}")


def nearest(folder: Path) -> str:
    """A hint at the folder beside it that was probably meant."""
    if not folder.parent.is_dir():
        return "; check the path"
    there = sorted(one.name for one in os.scandir(folder.parent) if one.is_dir())
    found = get_close_matches(folder.name, there, n=1)
    return f"; did you mean {folder.parent / found[0]}?" if found else "; check the path"


def identity_of(config: RunConfig | None) -> Identity | None:
    """What the cache of a run was made with; None where it is not on this machine any more."""
    if config is None or isinstance(config.cache, RemotePlace):
        return None
    with contextlib.suppress(OSError, UserError):
        return read_identity(CachePaths(config.cache))
    return None


def prompts_of(config: RunConfig | None) -> tuple[str, ...]:
    """The prompts of a run's previews, as `train sample` takes them; none where nobody knows."""
    if config is None:
        return ()
    if config.validation_prompts or isinstance(config.cache, RemotePlace):
        return tuple(config.validation_prompts)
    with contextlib.suppress(OSError, UserError):
        stored = load_conditioning(CachePaths(config.cache).conditioning)
        return tuple(stored.prompts[:MAX_PROMPTS])
    return ()
