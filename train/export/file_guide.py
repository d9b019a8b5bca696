"""Which file of an export is for which program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.export.kohya import KOHYA_FILE
from train.export.weights import LORA_FILE, UNET_FILES, UNET_FOLDER
from train.objectives import OBJECTIVES

COMFY_SOLVER = (50, 10.0)  # solver steps and timestep scaling of ComfyUI's LCM sampling


def file_guide(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Which of an export's files is for which program, and how it is drawn there."""
    few_steps = OBJECTIVES[config["objective"]].few_steps
    if config["student"] == "full":
        half = ', half as large with variant="fp16"' if half_precision(folder) else ""
        guided = "; ComfyUI does not know how to tell it the guidance" if few_steps else ""
        return [f"`{UNET_FOLDER}` is for diffusers{half}{guided}"]
    uses = [f"`{LORA_FILE}` is for diffusers; ComfyUI reads only half of its layers"]
    if (folder / KOHYA_FILE).is_file():
        drawn = f": {comfy_settings(config)}" if few_steps else ""
        programs = "ComfyUI, AUTOMATIC1111, Forge and sd-scripts"
        uses.append(f"`{KOHYA_FILE}`, the same LoRA, is for {programs}{drawn}")
    return uses


def comfy_settings(config: Mapping[str, Any]) -> str:
    """How a distilled LoRA is drawn in those programs."""
    text = "strength 1, CFG 1, sampler LCM, in ComfyUI with scheduler `simple`"
    solver = (config["num_ddim_timesteps"], config["timestep_scaling_factor"])
    if solver != COMFY_SOLVER:
        text += (
            f" (which takes {COMFY_SOLVER[0]} solver steps and scaling {COMFY_SOLVER[1]:g} for "
            f"granted, where this student has {solver[0]} and {solver[1]:g}: diffusers draws it "
            "as it was trained)"
        )
    return text


def half_precision(folder: Path) -> str:
    """Python for the `variant` of an exported UNet; nothing where it has no choice."""
    both, half = [(folder / UNET_FOLDER / file).is_file() for file in UNET_FILES.values()]
    if not half:
        return ""
    return '"fp16" if device == "cuda" else None' if both else '"fp16"'
