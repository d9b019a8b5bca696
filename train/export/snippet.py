"""The lines of a model card that draw with the student."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from shared.cache.conditioning import load_conditioning
from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.errors import UserError
from shared.models.family import Family, Model, native_resolution
from shared.models.single_file import is_single_file
from train.export.provenance import Provenance
from train.export.weights import LORA_FILE
from train.objectives import guidance_learned

ANY_PROMPT = "a photograph of a lighthouse at sunset"
DEVICE = """device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32
"""


def snippet(origin: Provenance, name: str, family: Family, variant: str = "") -> str:
    """Python that draws one picture with stock diffusers.

    `variant` is Python for that of a full student's weights.
    """
    source, kind, lora = origin.config.model, family.pipeline, origin.lora
    sampler = origin.objective.sampler
    scheduler = sampler.scheduler.__name__
    classes = [kind, scheduler, *([] if lora else ["UNet2DConditionModel"])]
    lines = f"import torch\nfrom diffusers import {', '.join(sorted(classes))}\n\n{DEVICE}"
    lines += f'scheduler = {scheduler}.from_pretrained({quoted(name)}, subfolder="scheduler")\n'
    parts = ["scheduler=scheduler", "torch_dtype=dtype"]
    if not lora:
        options = [quoted(name), 'subfolder="unet"', "torch_dtype=dtype"]
        options += [f"variant={variant}"] if variant else []
        lines += f"unet = {call('UNet2DConditionModel.from_pretrained', *options)}\n"
        parts.insert(0, "unet=unet")
    load = "from_pretrained"
    if is_single_file(source):
        load = "from_single_file"
        parts.insert(0, f"config={quoted(pipeline_config(source, family))}")
    lines += f"pipe = {call(f'{kind}.{load}', quoted(source), *parts)}.to(device)\n"
    if lora:
        lines += f"pipe.load_lora_weights({quoted(name)}, weight_name={quoted(LORA_FILE)})\n"
    side = resolution(origin, family)
    built_in = guidance_learned(origin.config) or origin.guidance_scale is not None
    image = call(
        "pipe",
        quoted(prompt(origin)),
        f"num_inference_steps={sampler.usual_steps(origin.config)}",
        f"guidance_scale={1.0 if built_in else family.guidance_scale}",
        f"height={side}",
        f"width={side}",
    )
    return lines + f'image = {image}.images[0]\nimage.save("picture.png")\n'


def call(function: str, *arguments: str) -> str:
    """Python that calls a function, each argument on a line of its own."""
    return f"{function}(\n" + "".join(f"    {one},\n" for one in arguments) + ")"


def pipeline_config(source: str, family: Family) -> str:
    """Where diffusers finds what a single file does not say: beside it, else the family's own."""
    beside = Path(source).with_suffix("")
    return str(beside) if (beside / "model_index.json").is_file() else family.pretrained


def quoted(text: str) -> str:
    """A Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def prompt(origin: Provenance) -> str:
    """One that the run was watched with, else any."""
    prompts = origin.config.validation_prompts
    if not prompts and origin.cache is not None:
        with contextlib.suppress(OSError, UserError):  # gone or out of reach
            prompts = load_conditioning(CachePaths(origin.cache).conditioning).prompts
    return prompts[0] if prompts else ANY_PROMPT


def resolution(origin: Provenance, family: Family) -> int:
    """The pixels that the cache was made at; the model's own where it cannot be read any more."""
    if origin.cache is not None:
        with contextlib.suppress(OSError, UserError):
            manifest = open_manifest(origin.cache, check_sizes=False)
            return manifest.identity.preprocessing.resolution
    return native_resolution(Model(origin.teacher, family))
