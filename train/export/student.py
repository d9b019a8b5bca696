"""Students in the formats that stock diffusers loads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from shared.errors import UserError
from shared.models.family import recorded_model, resolve_model
from shared.models.fingerprint import fingerprint, tensors_fingerprint
from shared.models.weights import load_whole
from shared.models.whole_model import beside_unet
from shared.networks.denoiser import Denoiser, load_unet
from shared.networks.styled import read_styles
from shared.storage.files import guard, publish, workshop
from shared.storage.replace_together import replace_together
from shared.storage.temporary import sweep
from shared.style import marks
from train.config import RunConfig
from train.export.file_guide import file_guide
from train.export.hub import push
from train.export.kohya import KOHYA_FILE
from train.export.model_card import CARD_FILE, PREVIEW_FILE, write_card
from train.export.provenance import SCHEDULER_FILE, Provenance
from train.export.standalone import (
    SINGLE_FILES,
    standalone_unet,
    told_metadata,
    whole_model,
    write_single_files,
)
from train.export.weights import (
    LORA_FILE,
    NOTHING,
    UNET_FILES,
    UNET_FOLDER,
    Worn,
    exported_student,
    lora_tensors,
    write_lora,
    write_unet,
)
from train.flag_groups import PublishFlags
from train.networks.teacher import styles_of
from train.state.run_config import run_config
from train.state.tensor_files import check_lora

COMPANIONS = (SCHEDULER_FILE, CARD_FILE, PREVIEW_FILE, *SINGLE_FILES.values())  # of the weights
Describe = Callable[[Path, str], object]  # the folder in which it is built, its fingerprint


def export_student(
    unet: Denoiser,
    folder: Path,
    dtype: str = "both",
    describe: Describe = lambda building, student: None,
    worn: Worn = NOTHING,
) -> Path:
    """Write a UNet folder, or `pytorch_lora_weights.safetensors` and, beside it, kohya's file.

    A LoRA has in it what its teacher has `worn`. Replaces the former export and returns what was
    written: `replace_export`.
    """
    tmp = folder / "tmp"
    if getattr(unet, "peft_config", None):
        write = partial(write_lora, unet, dtype=dtype, tmp=tmp, worn=worn)
        return replace_export(folder, LORA_FILE, (KOHYA_FILE, *COMPANIONS), write, describe)
    write = partial(write_unet, unet, dtype=dtype, tmp=tmp)
    return replace_export(folder, UNET_FOLDER, COMPANIONS, write, describe)


def export_standalone(
    origin: Provenance, unet: Denoiser, folder: Path, dtype: str, describe: Describe, worn: Worn
) -> Path:
    """Write a student as a plain UNet's folder and, with all parts of its model, as one file.

    The fingerprint is the student's, as it is in its ordinary export. Replaces as
    `replace_export`.
    """
    tmp = folder / "tmp"
    lora = origin.adapted
    student = tensors_fingerprint(lora_tensors(unet, worn)) if lora else fingerprint(unet)
    told = told_metadata(student, origin.guidance_scale)
    plain = standalone_unet(origin, unet, worn)
    whole = whole_model(plain, beside_unet(resolve_model(origin.teacher), origin.vae))

    def write(building: Path) -> str:
        write_unet(plain, building, dtype, tmp, told)
        write_single_files(whole, building, dtype, tmp, told)
        return student

    return replace_export(folder, UNET_FOLDER, COMPANIONS, write, describe)


def replace_export(
    folder: Path,
    primary: str,
    companions: Sequence[str],
    write: Callable[[Path], str],
    describe: Describe,
) -> Path:
    """Build an export beside the former one and replace that when all of it is whole.

    `write` is given the folder in which it is built and returns the student's fingerprint;
    `describe` may then put `COMPANIONS` there. No file of the former export is left beside the new
    ones. Returns the path of the `primary`. Raises UserError when the disk refuses; the former
    export is then as it was.
    """
    tmp = folder / "tmp"
    with guard(folder):
        sweep(tmp)
    with workshop(tmp, "-export") as building:
        describe(building, write(building))
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

    worn = worn_by_teacher(origin, unet)
    if origin.standalone:
        return export_standalone(origin, unet, folder, dtype, describe, worn)
    return export_student(unet, folder, dtype, describe, worn)


def worn_by_teacher(origin: Provenance, unet: Denoiser) -> Worn:
    """What a LoRA student needs besides its own weights; a full one has it in them."""
    styles = styles_of(origin.config) if origin.adapted else ()
    return Worn(read_styles(styles, unet), tuple(marks(styles)))


def publish_export(
    run: Path, origin: Provenance, folder: Path, flags: PublishFlags, latest: bool = True
) -> None:
    """With --push-to-hub, upload what `write_export` wrote; say where it is and what it is for."""
    kind = origin.kind
    if flags.push_to_hub:
        student = exported_student(folder, kind)
        write = partial(write_card, run, folder, folder / "tmp", origin, student, latest)
        print(f"published: {push(flags, run, folder, kind, write)}")
    for line in file_guide(folder, origin):
        print(f"note: {line}", file=sys.stderr)


def student_file(run: Path, config: RunConfig) -> Path:
    """Where the exported student of a run with this configuration lies: a file, or a folder."""
    return run / (LORA_FILE if config.student == "lora" else UNET_FOLDER)


def written_student(run: Path, config: RunConfig) -> Path:
    """The same where it is there. Raises UserError where the run has no export."""
    wanted = student_file(run, config)
    if not wanted.exists():
        raise UserError(
            f"{run} has no {wanted.name} yet; let `train distill` finish, "
            f"or run `python -m train export --run {run}`"
        )
    return wanted


def load_student(
    run: Path, device: torch.device, model: str | None = None
) -> tuple[Denoiser, RunConfig]:
    """An exported student, ready to draw, and the configuration it was distilled with.

    A LoRA's teacher is `model`, else the run's own. Raises UserError where the run has no export.
    """
    config = run_config(run)
    wanted = written_student(run, config)
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
