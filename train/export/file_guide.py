"""Which file of an export is for which program."""

from __future__ import annotations

from pathlib import Path

from train.config import RunConfig
from train.export.kohya import KOHYA_FILE
from train.export.weights import LORA_FILE, UNET_FILES, UNET_FOLDER
from train.objectives import objective_of


def file_guide(folder: Path, config: RunConfig) -> list[str]:
    """Say which of an export's files is for which program, and how it is drawn there."""
    objective = objective_of(config)
    if config.student == "full":
        half = ', half as large with variant="fp16"' if half_precision(folder) else ""
        guided = "; ComfyUI does not know how to tell it the guidance"
        return [f"`{UNET_FOLDER}` is for diffusers{half}{guided * objective.takes_guidance}"]
    lines = [f"`{LORA_FILE}` is for diffusers; ComfyUI reads only half of its layers"]
    if (folder / KOHYA_FILE).is_file():
        settings = objective.card.other_programs
        drawn = f": {settings(config)}" if settings else ""
        programs = "ComfyUI, AUTOMATIC1111, Forge and sd-scripts"
        lines.append(f"`{KOHYA_FILE}`, the same LoRA, is for {programs}{drawn}")
    return lines


def half_precision(folder: Path) -> str:
    """Python for the `variant` of an exported UNet; nothing where it has no choice."""
    both, half = [(folder / UNET_FOLDER / file).is_file() for file in UNET_FILES.values()]
    if not half:
        return ""
    return '"fp16" if device == "cuda" else None' if both else '"fp16"'
