"""Students in the formats that stock diffusers loads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from shared.errors import UserError
from shared.models.family import recorded_model
from shared.models.weights import load_whole
from shared.networks.denoiser import Denoiser, load_unet
from shared.storage.files import guard, publish, workshop
from shared.storage.replace_together import replace_together
from shared.storage.temporary import sweep
from train.config import RunConfig
from train.export.file_guide import file_guide
from train.export.hub import push
from train.export.kohya import KOHYA_FILE
from train.export.model_card import CARD_FILE, PREVIEW_FILE, write_card
from train.export.provenance import SCHEDULER_FILE, Provenance
from train.export.weights import (
    LORA_FILE,
    UNET_FILES,
    UNET_FOLDER,
    exported_student,
    write_lora,
    write_unet,
)
from train.flag_groups import PublishFlags
from train.state.run_config import run_config
from train.state.tensor_files import check_lora

COMPANIONS = (SCHEDULER_FILE, CARD_FILE, PREVIEW_FILE)  # of the weights


def export_student(
    unet: Denoiser,
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
    run: Path,
    origin: Provenance,
    unet: Denoiser,
    folder: Path,
    dtype: str = "both",
    latest: bool = True,
) -> Path:
    """Export a run's student with its scheduler and model card; return the weights' path."""
    tmp = folder / "tmp"

    def describe(building: Path, student: str) -> None:
        scheduler = origin.scheduler().to_json_string()
        publish([scheduler.encode()], building / SCHEDULER_FILE, tmp)
        write_card(run, building, tmp, origin, student, latest, str(folder))

    return export_student(unet, folder, dtype, describe)


def publish_export(
    run: Path, origin: Provenance, folder: Path, flags: PublishFlags, latest: bool = True
) -> None:
    """With --push-to-hub, upload what `write_export` wrote; say where it is and what it is for."""
    kind = origin.config.student
    if flags.push_to_hub:
        student = exported_student(folder, kind)
        write = partial(write_card, run, folder, folder / "tmp", origin, student, latest)
        print(f"published: {push(flags, run, folder, kind, write)}")
    for line in file_guide(folder, origin.config):
        print(f"note: {line}", file=sys.stderr)


def student_file(run: Path, config: RunConfig) -> Path:
    """Where the exported student of a run with this configuration lies: a file, or a folder."""
    return run / (LORA_FILE if config.student == "lora" else UNET_FOLDER)


def load_student(
    run: Path, device: torch.device, model: str | None = None
) -> tuple[Denoiser, RunConfig]:
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
    if config.student == "lora":
        unet = load_unet(model or recorded_model(config.model))
        check_lora(wanted, unet)
        unet.load_lora_adapter(run, prefix="unet", weight_name=LORA_FILE)
        unet.fuse_lora()  # drawing costs twice as much with the adapters beside the layers
        unet.unload_lora()
    else:
        unet = load_exported_unet(wanted)
    unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return unet.to(device), config


def load_exported_unet(folder: Path) -> Denoiser:
    """A UNet in diffusers' format, in fp32. Raises UserError where there is none."""
    unet: Denoiser = load_whole(
        UNet2DConditionModel.from_pretrained, str(folder), "UNet", torch_dtype=torch.float32,
        variant=variant(folder), use_safetensors=True,
    )  # fmt: skip
    return unet


def variant(unet: Path) -> str | None:
    """Return which of an exported UNet's weights diffusers shall take: None for fp32, if there."""
    only_half = not (unet / UNET_FILES["fp32"]).is_file() and (unet / UNET_FILES["fp16"]).is_file()
    return "fp16" if only_half else None
