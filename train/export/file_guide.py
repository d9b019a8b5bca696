"""Which file of an export is for which program."""

from __future__ import annotations

from pathlib import Path

from train.export.kohya import KOHYA_FILE
from train.export.provenance import Provenance
from train.export.standalone import SINGLE_FILES
from train.export.weights import LORA_FILE, UNET_FILES, UNET_FOLDER

OTHERS = "ComfyUI, AUTOMATIC1111, Forge"


def file_guide(folder: Path, origin: Provenance) -> list[str]:
    """Say which of an export's files is for which program, and how it is drawn there."""
    guide = {"lora": lora_guide, "full": full_guide, "standalone": standalone_guide}
    return guide[origin.kind](folder, origin)


def lora_guide(folder: Path, origin: Provenance) -> list[str]:
    """Of a LoRA."""
    lines = [f"`{LORA_FILE}` is for diffusers; ComfyUI reads only half of its layers"]
    if (folder / KOHYA_FILE).is_file():
        drawn = drawn_elsewhere(origin, "strength 1, ")
        programs = f"{OTHERS} and sd-scripts"
        lines.append(f"`{KOHYA_FILE}`, the same LoRA, is for {programs}{drawn}")
    return lines


def full_guide(folder: Path, origin: Provenance) -> list[str]:
    """Of a full student."""
    half = ', half as large with variant="fp16"' if half_precision(folder) else ""
    guided = "; ComfyUI does not know how to tell it the guidance (`--guidance-scale` folds one in)"
    return [f"`{UNET_FOLDER}` is for diffusers{half}{guided * origin.objective.takes_guidance}"]


def standalone_guide(folder: Path, origin: Provenance) -> list[str]:
    """Of a student that is a model of its own."""
    half = ', half as large with variant="fp16"' if half_precision(folder) else ""
    files = [f"`{file}`" for file in SINGLE_FILES.values() if (folder / file).is_file()]
    lines = [f"`{UNET_FOLDER}` is a UNet for diffusers{half}"]
    if files:
        drawn = drawn_elsewhere(origin)
        either = " or, half as large, ".join(files)
        lines.append(
            f"{either} is the whole model, with VAE and text encoders, for {OTHERS}{drawn}"
        )
    return lines


def drawn_elsewhere(origin: Provenance, before: str = "") -> str:
    """How it is drawn in other programs, behind a colon; nothing where there is nothing to say."""
    settings = origin.objective.card.other_programs
    return f": {before}{settings(origin.config)}" if settings else ""


def half_precision(folder: Path) -> str:
    """Python for the `variant` of an exported UNet; nothing where it has no choice."""
    both, half = [(folder / UNET_FOLDER / file).is_file() for file in UNET_FILES.values()]
    if not half:
        return ""
    return '"fp16" if device == "cuda" else None' if both else '"fp16"'
