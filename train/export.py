"""Students in the formats that stock diffusers loads."""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft.utils import get_peft_model_state_dict

from shared.cache import Manifest
from shared.config import coerce
from shared.errors import UserError
from shared.family import load_config, resolve_model
from shared.storage import copy_durably, guard, move, publish, sync_tree
from shared.temporary import sweep, temporary
from shared.weights import load_whole
from train.card import write_card
from train.checkpoint import (
    check_terms,
    find_checkpoint,
    read_progress,
    whole_checkpoints,
)
from train.config import DistillConfig, ExportConfig
from train.hub import check_push, push
from train.kohya import KOHYA_FILE, save_kohya
from train.objectives import OBJECTIVES
from train.restore import restore_networks
from train.sample import student_scheduler, teacher_scheduler
from train.stored import stored_config
from train.student import build_student
from train.teacher import load_unet
from train.tensors import check_lora
from train.terms import run_terms

LORA_FILE = "pytorch_lora_weights.safetensors"
UNET_FOLDER = "unet"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
NO_CACHE = Manifest({"family": None}, (), (), (), {}, {}, {})


def export_student(unet: UNet2DConditionModel, folder: Path) -> Path:
    """Write a UNet folder, or `pytorch_lora_weights.safetensors` with rank and alpha.

    Beside the latter lies `kohya_lora_weights.safetensors` for ComfyUI and its like, unless it
    cannot express a layer. The former export is replaced only when the new one is whole. Returns
    what was written.
    """
    tmp = folder / "tmp"
    sweep(tmp)
    building = temporary(tmp, "-export")
    building.mkdir(parents=True)
    if getattr(unet, "peft_config", None):
        save_lora(unet, building)
        try:
            save_kohya(unet, building / KOHYA_FILE)
        except UserError as error:
            print(f"note: {KOHYA_FILE} is left out: {error}", file=sys.stderr)
            (folder / KOHYA_FILE).unlink(missing_ok=True)  # of a former export
        else:
            copy_durably(building / KOHYA_FILE, folder / KOHYA_FILE, tmp)
        copy_durably(building / LORA_FILE, folder / LORA_FILE, tmp)
        shutil.rmtree(building)
        return folder / LORA_FILE
    unet.save_pretrained(building)
    sync_tree(building)
    final, old = folder / UNET_FOLDER, temporary(tmp, "-old")
    if final.exists():
        os.replace(final, old)
    move(building, final)
    shutil.rmtree(old, ignore_errors=True)
    return final


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """diffusers' LoRA file; its metadata carry the adapter's config, alpha included.

    The names stay peft's throughout: diffusers' own conversion renames the attention layers only,
    and a file with both kinds of names loses half its modules on loading.
    """
    xl = unet.config.addition_embed_type == "text_time"
    pipeline = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    adapter = unet.peft_config["default"].to_dict()
    adapter["target_modules"] = sorted(adapter["target_modules"])
    pipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=adapter,
    )


def export_checkpoint(config: ExportConfig) -> Path:
    """Export a checkpoint of a run, with its card; publish it if asked to.

    Raises UserError where there is none, where it is of another run, or where the hub refuses.
    """
    check_push(config)
    stored = run_config(config.run)
    checkpoint = wanted_checkpoint(config)
    folder = config.output or config.run
    with guard(folder):
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
    distilled = DistillConfig(**coerce(DistillConfig, stored))
    model = resolve_model(distilled.model)
    student = build_student(model.source, distilled)
    before = read_progress(checkpoint)
    terms = run_terms(distilled, NO_CACHE, model, student)
    # Its cache may have grown or be gone: an export does not need it.
    check_terms(checkpoint, before.terms, {**terms, "cache": before.terms.get("cache")})
    restore_networks(checkpoint, student)
    path = export_student(student.exported(), folder)
    latest = [path.resolve() for path in whole_checkpoints(config.run)[-1:]]
    publish_export(config, folder, before.step, checkpoint.resolve() in latest)
    return path


def wanted_checkpoint(config: ExportConfig) -> Path:
    """The checkpoint to export. Raises UserError where there is none."""
    try:
        folder = find_checkpoint(config.run, config.checkpoint)
    except UserError as error:  # which names the flag of `distill`
        raise UserError(str(error).replace("--resume-from-checkpoint", "--checkpoint")) from None
    if folder is None:
        raise UserError(f"{config.run} has no checkpoint yet")
    return folder


def publish_export(
    config: DistillConfig | ExportConfig, folder: Path, step: int | None = None, latest: bool = True
) -> None:
    """Write an export's scheduler and model card; with --push-to-hub, upload all and say where.

    `step` is that of the student, the run's last unless given.
    """
    stored = run_config(config.run)
    stored["max_train_steps"] = step or stored["max_train_steps"]
    scheduler = drawing_scheduler(stored).to_json_string()
    publish([scheduler.encode()], folder / SCHEDULER_FILE, folder / "tmp")
    write = partial(write_card, config.run, folder, stored, latest)
    write(str(folder))
    if config.push_to_hub:
        print(f"published: {push(config, folder, write)}")


def drawing_scheduler(config: dict[str, Any]) -> Any:
    """The scheduler that the student of a run with this `config` is drawn with."""
    teacher = load_config(config["model"], SCHEDULER_FILE)
    if OBJECTIVES[config["objective"]].few_steps:
        return student_scheduler(teacher, config)
    return teacher_scheduler("ddim", "trailing", teacher)


def run_config(run: Path) -> dict[str, Any]:
    """A run's resolved configuration. Raises UserError where the folder is no run, or damaged."""
    if not (run / "config.json").exists():
        raise UserError(f"{run} is no run (no config.json); `train distill --run {run}` makes one")
    return stored_config(run / "config.json")


def load_student(run: Path, device: torch.device) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """An exported student, ready to draw, and the configuration it was distilled with.

    Raises UserError where the run has no export.
    """
    config = run_config(run)
    wanted = run / (LORA_FILE if config["student"] == "lora" else UNET_FOLDER)
    if not wanted.exists():
        raise UserError(
            f"{run} has no {wanted.name} yet; let `train distill` finish, "
            f"or run `python -m train export --run {run}`"
        )
    if config["student"] == "lora":
        unet = load_unet(config["model"])
        check_lora(wanted, unet)
        unet.load_lora_adapter(run, prefix="unet", weight_name=LORA_FILE)
        unet.fuse_lora()  # drawing costs twice as much with the adapters beside the layers
        unet.unload_lora()
    else:
        unet = load_whole(
            UNet2DConditionModel.from_pretrained, str(wanted), "UNet", torch_dtype=torch.float32
        )
    unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return unet.to(device), config
