"""A student as a model of its own, which any program draws with: nothing is to be told or added."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from shared.errors import UserError
from shared.models.original_layout import original_unet
from shared.networks.denoiser import Denoiser, load_unet
from shared.networks.styled import wear
from shared.storage.files import publish
from shared.storage.tensors import tensor_chunks
from train.config import ExportConfig, RunConfig
from train.export.provenance import Provenance
from train.export.weights import STUDENT, Worn, full_precision, halved, lora_tensors
from train.networks.full import plain_copy
from train.objectives import is_told_guidance, objective_of

SINGLE_FILES = {"fp32": "student.safetensors", "fp16": "student.fp16.safetensors"}
GUIDANCE = "distillery.guidance_scale"  # in a file's metadata: what is folded into it


def check_standalone(flags: ExportConfig, config: RunConfig) -> None:
    """Raise UserError for a guidance that has no place in the student, and for one that lacks."""
    told = is_told_guidance(config)
    if flags.guidance_scale is not None and not told:
        kind = "a LoRA" if config.student == "lora" else "this UNet"
        why = "takes" if objective_of(config).sampler.classifier_free else "has learned"
        how = "its guidance from whoever draws" if why == "takes" else "its own guidance"
        raise UserError(
            f"--guidance-scale is for a full student that is told its guidance; {kind} of "
            f"--objective {config.objective} {why} {how}: use --standalone alone"
        )
    if flags.standalone and told and flags.guidance_scale is None:
        raise UserError(
            "--standalone: this student is told its guidance, which other programs cannot; say "
            "which one to fold in, such as --guidance-scale 7.5"
        )


def standalone_folder(run: Path, guidance_scale: float | None) -> Path:
    """Where such an export lies unless --output says."""
    return run / ("standalone" if guidance_scale is None else f"guidance-{guidance_scale:g}")


def note_range(origin: Provenance) -> None:
    """Say so where the guidance is none that the student was trained for."""
    low, high = (w + 1 for w in origin.guidance_range)
    if origin.guidance_scale is not None and not low <= origin.guidance_scale <= high:
        print(
            f"note: --guidance-scale {origin.guidance_scale:g} is outside of {low:g} to {high:g}, "
            "which the student was trained for",
            file=sys.stderr,
        )


def standalone_unet(origin: Provenance, unet: Denoiser, worn: Worn) -> Denoiser:
    """A UNet of the teacher's architecture that computes what the student does, fp32.

    A LoRA, with what its teacher has `worn`, is added to the plain model's weights; a guidance is
    folded in.
    """
    if origin.adapted:
        base = load_unet(origin.teacher)
        wear(base, lora_tensors(unet, worn))
        return base
    if origin.guidance_scale is not None:
        return plain_copy(unet, origin.guidance_scale - 1)
    return unet


def whole_model(unet: Denoiser, beside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model in the original layout; `beside` is all but the UNet (`beside_unet`).

    Raises UserError for a layer that the layout does not have.
    """
    return {**beside, **original_unet(unet.state_dict(), unet.config.layers_per_block)}


def write_single_files(
    whole: Mapping[str, Tensor], folder: Path, dtype: str, tmp: Path, metadata: Mapping[str, str]
) -> None:
    """Write a whole model in one file, in fp32, fp16 or `both`."""
    for name, file in SINGLE_FILES.items():
        if dtype in (name, "both"):
            tensors = halved(whole) if name == "fp16" else full_precision(whole)
            publish(tensor_chunks(tensors, {"format": "pt", **metadata}), folder / file, tmp)


def told_metadata(student: str, guidance_scale: float | None) -> dict[str, str]:
    """Whose weights they are, and which guidance is inside."""
    guidance = {} if guidance_scale is None else {GUIDANCE: f"{guidance_scale:g}"}
    return {STUDENT: student, **guidance}
