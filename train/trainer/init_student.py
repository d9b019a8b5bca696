"""--init-student: a run begins where another student ended, instead of with the teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from shared.errors import UserError
from shared.models.fingerprint import tensors_fingerprint
from shared.models.lora_files import read_lora
from shared.networks.styled import read_styles
from shared.storage.ownership import absolute
from shared.storage.tensors import read_metadata
from shared.style import FLAG, described, marks
from train.config import RunConfig
from train.export.kohya import KOHYA_FILE
from train.export.student import load_exported_unet
from train.export.weights import LORA_FILE, STYLES, UNET_FILES, UNET_FOLDER
from train.networks.student import Student
from train.networks.teacher import styles_of
from train.state.checkpoint import TrainingState
from train.state.run_config import run_config

INIT_STUDENT = "init_student"  # a term of a run: the fingerprint of the weights it began with
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def begin(student: Student, config: RunConfig, before: TrainingState | None) -> str | None:
    """Let a student begin with the weights that --init-student names; returns their fingerprint.

    None without the flag. A run that goes on has its weights from a checkpoint, and reads the
    others again only where they are not where they were. Raises UserError for weights that do not
    fit, and where a run that goes on began otherwise.
    """
    begun = None if before is None else before.terms.get(INIT_STUDENT)
    if before is not None and (config.init_student is None) != (begun is None):
        way = f"give --init-student {recorded(config)}" if begun else "leave --init-student out"
        what = "another student's weights" if begun else "the teacher's"
        raise UserError(f"{config.run} began with {what}; {way}, or choose another --run")
    if config.init_student is None:
        return None
    former = recorded(config)
    if begun is not None and former and absolute(former) == absolute(config.init_student):
        return str(begun)
    weights = read_weights(config.init_student, student, config)
    if before is None:
        student.begin_with(weights, f"--init-student {config.init_student}")
    return tensors_fingerprint(weights)


def recorded(config: RunConfig) -> Path | None:
    """What a run that has begun was given as --init-student."""
    if not (config.run / "config.json").is_file():
        return None
    return run_config(config.run).init_student


def read_weights(path: Path, student: Student, config: RunConfig) -> Mapping[str, Tensor]:
    """The weights at `path` for a run's kind of student. Raises UserError where none are."""
    place = find_weights(path, config.student)
    if config.student == "lora":
        return without_styles(read_lora(place, student.unet.config), place, student, config)
    weights: Mapping[str, Tensor] = load_exported_unet(place).state_dict()
    return weights


def without_styles(
    lora: Mapping[str, Tensor], path: Path, student: Student, config: RunConfig
) -> Mapping[str, Tensor]:
    """A LoRA student without what its teacher wore, where this run's teacher wears it already.

    The style has the first ranks of each layer. Raises UserError where the two wear others.
    """
    styles = styles_of(config)
    worn = worn_in(path)
    if not styles or not worn:
        return lora
    if worn != marks(styles):
        raise UserError(
            f"--init-student {config.init_student} has in it what its teacher wore "
            f"({', '.join(worn)}), and this teacher wears {described(styles)}; give the same "
            f"{FLAG}, or none"
        )
    worn_ranks = {
        name.rpartition(".lora_")[0]: len(tensor)
        for name, tensor in read_styles(styles, student.unet).items()
        if ".lora_A." in name
    }
    own: dict[str, Tensor] = {}
    for name, down in lora.items():
        layer, _, part = name.rpartition(".lora_")
        if part == "A.weight":
            first = worn_ranks.get(layer, 0)
            last = first + int(down[first:].flatten(1).any(1).sum())  # behind them zeros fill up
            up = name.replace(".lora_A.", ".lora_B.")
            if last > first:
                own |= {name: down[first:last], up: lora[up][:, first:last]}
    return own


def worn_in(path: Path) -> list[str]:
    """What the teacher of an exported LoRA student wore, which is among its weights."""
    try:
        return [str(mark) for mark in json.loads(read_metadata(path).get(STYLES, "[]"))]
    except (ValueError, TypeError, RecursionError):
        return []


def find_weights(path: Path, kind: str) -> Path:
    """Where a `lora` or `full` student lies that `path` names: a file, a run, or another folder.

    Raises UserError where there is none, or one of the other kind.
    """
    found = {"lora": lora_at(path), "full": unet_at(path)}
    place = found[kind]
    if place is not None:
        return place
    flag = f"--init-student {path}"
    if path.suffix in PICKLES and path.is_file():
        raise UserError(f"{flag} is a pickle, which can run code; give it as .safetensors")
    if not path.exists():
        raise UserError(
            f"{flag}: there is no such file; give a run, a UNet in diffusers' format or a LoRA "
            "file (`hf download` fetches one of the hub)"
        )
    if found["lora"] is not None:
        raise UserError(f"{flag} is a LoRA; go on with it by --student lora")
    if found["full"] is not None:
        raise UserError(f"{flag} is a whole UNet; go on with it by --student full")
    if (path / "checkpoints").is_dir():
        raise UserError(
            f"{flag} has no exported student yet; `python -m train export --run {path}` makes one"
        )
    raise UserError(f"{flag} holds no student: neither a LoRA nor a UNet in diffusers' format")


def lora_at(path: Path) -> Path | None:
    """The LoRA file that `path` is, or that lies there."""
    places = (path, path / LORA_FILE, path / KOHYA_FILE)
    return next((p for p in places if p.suffix == ".safetensors" and p.is_file()), None)


def unet_at(path: Path) -> Path | None:
    """The UNet's folder that `path` is, or that lies there, as in a run or a pipeline."""
    for folder in (path / UNET_FOLDER, path):
        if any((folder / file).is_file() for file in UNET_FILES.values()):
            return folder
    return None
