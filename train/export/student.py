"""Students in the formats that stock diffusers loads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from shared.cache.manifest import Manifest
from shared.errors import UserError
from shared.models.family import load_config, recorded_model
from shared.models.weights import load_whole
from shared.storage.files import guard, publish, workshop
from shared.storage.temporary import sweep
from shared.storage.together import replace_together
from shared.storage.urls import is_url
from train.config import DistillConfig, ExportConfig
from train.export.file_guide import file_guide
from train.export.hub import push
from train.export.kohya import KOHYA_FILE
from train.export.model_card import CARD_FILE, PREVIEW_FILE, write_card
from train.export.weights import (
    LORA_FILE,
    UNET_FILES,
    UNET_FOLDER,
    exported_student,
    write_lora,
    write_unet,
)
from train.networks.teacher import load_unet
from train.objectives import OBJECTIVES
from train.sampling.samplers import student_scheduler, teacher_scheduler
from train.state.run_config import stored_config
from train.state.run_paths import found
from train.state.tensor_files import check_lora

SCHEDULER_FILE = "scheduler/scheduler_config.json"
COMPANIONS = (SCHEDULER_FILE, CARD_FILE, PREVIEW_FILE)  # of the weights
NO_CACHE = Manifest({"family": None}, (), (), (), {}, {}, {})


def export_student(
    unet: UNet2DConditionModel,
    folder: Path,
    dtype: str = "both",
    describe: Callable[[Path, str], object] = lambda building, student: None,
) -> Path:
    """Write a UNet folder, or `pytorch_lora_weights.safetensors` and, beside it, kohya's file.

    `describe` is called with the folder in which the export is built and the student's
    fingerprint, and may put `COMPANIONS` there. The former export is replaced when all of the new
    one is whole, and no file of it is left beside the new ones. Returns what was written. Raises
    UserError when the disk refuses; the former export is then as it was.
    """
    tmp = folder / "tmp"
    with guard(folder):
        sweep(tmp)
    with workshop(tmp, "-export") as building:
        lora = bool(getattr(unet, "peft_config", None))
        write, primary = (write_lora, LORA_FILE) if lora else (write_unet, UNET_FOLDER)
        describe(building, write(unet, building, dtype, tmp))
        companions = (KOHYA_FILE, *COMPANIONS) if lora else COMPANIONS
        replace_together(building, folder, primary, companions)
    return folder / primary


def write_export(
    config: DistillConfig | ExportConfig,
    unet: UNet2DConditionModel,
    folder: Path,
    step: int | None = None,
    latest: bool = True,
) -> Path:
    """Export a run's student with its scheduler and model card; returns the weights' path.

    `step` is that of the student, the run's last unless given.
    """
    stored = told_config(config, step)
    tmp = folder / "tmp"

    def describe(building: Path, student: str) -> None:
        scheduler = drawing_scheduler(stored).to_json_string()
        publish([scheduler.encode()], building / SCHEDULER_FILE, tmp)
        write_card(config.run, building, tmp, stored, student, latest, str(folder))

    return export_student(unet, folder, config.export_dtype, describe)


def publish_export(
    config: DistillConfig | ExportConfig, folder: Path, step: int | None = None, latest: bool = True
) -> None:
    """With --push-to-hub, upload what `write_export` wrote; say where it is and what it is for."""
    stored = told_config(config, step)
    if config.push_to_hub:
        student = exported_student(folder, stored["student"])
        write = partial(write_card, config.run, folder, folder / "tmp", stored, student, latest)
        print(f"published: {push(config, folder, stored['student'], write)}")
    for line in file_guide(folder, stored):
        print(f"note: {line}", file=sys.stderr)


def told_config(config: DistillConfig | ExportConfig, step: int | None) -> dict[str, Any]:
    """A run's configuration as its student's card tells it: with the steps that it took.

    `teacher` is where its files are: an export asks no address that a run records, so a cache
    behind a URL is None in it.
    """
    stored = run_config(config.run)
    named = isinstance(config, DistillConfig)
    if not named and is_url(str(stored["cache"])):
        stored["cache"] = None
    teacher = stored["model"] if named else config.model or recorded_model(str(stored["model"]))
    steps = step or stored["max_train_steps"]
    return {**stored, "teacher": teacher, "max_train_steps": steps}


def drawing_scheduler(config: dict[str, Any]) -> Any:
    """The scheduler that the student of a run with this `told_config` is drawn with."""
    teacher = load_config(str(config["teacher"]), SCHEDULER_FILE)
    if OBJECTIVES[config["objective"]].few_steps:
        return student_scheduler(teacher, config)
    return teacher_scheduler("ddim", "trailing", teacher)


def run_config(run: Path) -> dict[str, Any]:
    """A run's resolved configuration, its paths as they lead from here.

    Raises UserError where the folder is no run, or damaged.
    """
    if not (run / "config.json").exists():
        raise UserError(f"{run} is no run (no config.json); `train distill --run {run}` makes one")
    return found(stored_config(run / "config.json"), run)


def student_file(run: Path, config: Mapping[str, Any]) -> Path:
    """Where the exported student of a run with this configuration lies: a file, or a folder."""
    return run / (LORA_FILE if config["student"] == "lora" else UNET_FOLDER)


def load_student(
    run: Path, device: torch.device, model: str | None = None
) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """An exported student, ready to draw, and the configuration it was distilled with.

    A LoRA's teacher is `model`, else the run's own. Raises UserError where the run has no export.
    """
    config = run_config(run)
    wanted = student_file(run, config)
    if not wanted.exists():
        raise UserError(
            f"{run} has no {wanted.name} yet; let `train distill` finish, "
            f"or run `python -m train export --run {run}`"
        )
    if config["student"] == "lora":
        unet = load_unet(model or recorded_model(str(config["model"])))
        check_lora(wanted, unet)
        unet.load_lora_adapter(run, prefix="unet", weight_name=LORA_FILE)
        unet.fuse_lora()  # drawing costs twice as much with the adapters beside the layers
        unet.unload_lora()
    else:
        unet = load_whole(
            UNet2DConditionModel.from_pretrained,
            str(wanted),
            "UNet",
            torch_dtype=torch.float32,
            variant=variant(wanted),
        )
    unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return unet.to(device), config


def variant(unet: Path) -> str | None:
    """diffusers' name for the weights to take of an exported UNet: those in fp32 if it has them."""
    only_half = not (unet / UNET_FILES["fp32"]).is_file() and (unet / UNET_FILES["fp16"]).is_file()
    return "fp16" if only_half else None
