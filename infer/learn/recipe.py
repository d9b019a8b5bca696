"""What is learned, of what, and how; the same recipe is learned once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infer.config import LearnFlags
from infer.pictures.read import checked
from shared.cache.identity import differences
from shared.cli.defaults import RUNS
from shared.errors import UserError
from shared.models.family import (
    FAMILIES,
    Model,
    model_name,
    native_resolution,
    unet_config,
    vae_downscale,
)
from shared.storage.files import dump_json, load_record, publish
from shared.storage.ownership import absolute
from shared.storage.typed_json import record_of

LEARNED = RUNS / "learned"
RECORD = "learned.json"
SLUG = 40  # characters of the picture's name in that of its run
# DiffMorpher's for Stable Diffusion. A network as narrow as data/'s wants larger steps.
USUAL_RATE, NARROW_RATE, NARROW = 2e-4, 4e-3, 128


@dataclass(frozen=True)
class Recipe:
    """A picture, its prompt, the model, and every flag that the LoRA depends on."""

    picture: str  # the file's name
    picture_sha256: str
    prompt: str
    model: str
    vae: str
    resolution: int
    steps: int
    rank: int
    learning_rate: float
    train_batch_size: int
    seed: int

    @property
    def digest(self) -> str:
        """Six hex digits that tell it from others; the file may have any name."""
        named = {name: value for name, value in asdict(self).items() if name != "picture"}
        return hashlib.sha256(dump_json(named)).hexdigest()[:6]

    def folder(self) -> Path:
        """Where it is learned unless told: in a folder of its own, or where it has been already."""
        found = sorted(LEARNED.glob(f"*-{self.digest}"))
        stem = re.sub(r"\W+", "-", Path(self.picture).stem).strip("-")[:SLUG] or "picture"
        return found[0] if found else LEARNED / f"{stem}-{self.digest}"


def recipe_of(flags: LearnFlags, model: Model, picture: Path, prompt: str, steps: int) -> Recipe:
    """Decide what the flags leave open. Raises UserError for what is no picture, and no side."""
    data = checked(picture, "picture")
    unit = vae_downscale(model.source)
    resolution = flags.resolution or native_resolution(model)
    if resolution % unit:
        raise UserError(f"--resolution {resolution} is not a multiple of {unit}, a latent's side")
    return Recipe(
        picture=picture.name,
        picture_sha256=hashlib.sha256(data).hexdigest(),
        prompt=prompt,
        model=lasting_name(flags.model),
        vae=lasting_name(flags.vae or flags.model),
        resolution=resolution,
        steps=steps,
        rank=flags.rank,
        learning_rate=flags.learning_rate or usual_rate(unet_config(model.source)),
        train_batch_size=flags.train_batch_size,
        seed=flags.seed,
    )


def lasting_name(source: str) -> str:
    """A model's name that means the same in every folder: a preset, an absolute path, a hub id."""
    if model_name(source) in FAMILIES and source == model_name(source):
        return source
    return str(absolute(Path(source))) if Path(source).exists() else source


def usual_rate(unet: Mapping[str, Any]) -> float:
    """The learning rate for a UNet of this configuration."""
    return NARROW_RATE if unet["block_out_channels"][0] < NARROW else USUAL_RATE


def check(folder: Path, recipe: Recipe) -> None:
    """Raise UserError where a folder has learned something else, or is for something else."""
    record = folder / RECORD
    if record.is_file():
        stored = load_record(record, lambda told: record_of(Recipe, told), "remove the folder")
        before, now = asdict(stored), asdict(recipe)
        if changed := {name for name in now if before[name] != now[name]} - {"picture"}:
            there, here = ({name: side[name] for name in changed} for side in (before, now))
            raise UserError(
                f"{folder} has learned something else: {differences(there, here)}; choose another "
                "--output"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} is there already and is no picture's run; choose another --output"
        )


def claim(folder: Path, recipe: Recipe) -> None:
    """Write down what a folder learns. Raises UserError as `check` does."""
    check(folder, recipe)
    if not (folder / RECORD).exists():
        publish([dump_json(asdict(recipe))], folder / RECORD, folder / "tmp")
