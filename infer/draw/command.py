"""`infer draw`: prompts become pictures, by stock pipelines."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infer.config import DrawConfig
from infer.draw.artist import draw_one, seconds_expected, steps_taken
from infer.draw.flags import check_flags
from infer.draw.job import Job, plan_job
from infer.pictures.write import write_drawn, write_sheet
from infer.pipelines.build import load_pipeline, pick_dtype
from infer.pipelines.choose import choose
from shared.cli.progress import Progress
from shared.errors import UserError
from shared.machine.device import pick_device, set_threads
from shared.wording import duration

OTHER_KINDS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jxl"}
SLUG = 48  # characters of the prompt in a file's name


def draw(config: DrawConfig) -> None:
    """Draw every prompt from every seed into files that say how. Raises UserError first."""
    check_flags(config)
    set_threads(config.threads)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    job = plan_job(config, choose(config), str(dtype).removeprefix("torch."))
    check_output(config.output)
    print(f"{job} on {device.type}, into {config.output}", file=sys.stderr)
    parts = (job.given.kind, config.controlnet, job.folded)
    pipe = load_pipeline(job.choice, device, dtype, *parts)
    note_truncated(pipe, job)
    note_guidance(job)
    steps = steps_taken(pipe, job)
    print(f"this takes about {duration(seconds_expected(pipe, job, steps))}", file=sys.stderr)
    rows = draw_all(pipe, job, steps, config.output)
    if job.count > 1:
        sheet = config.output if is_file(config.output) else config.output / "sheet.png"
        write_sheet(sheet, rows, [f"seed {seed}" for seed in job.seeds], job.prompts)
        print(sheet)


def draw_all(pipe: Any, job: Job, steps: int, output: Path) -> list[list[NDArray[np.uint8]]]:
    """Draw and write picture after picture; returns a row of pixels for each prompt."""
    drawn = list[NDArray[np.uint8]]()
    with Progress("draw", job.count * steps, "step") as progress:
        for prompt, seed in job.pictures():
            drawn.append(draw_one(pipe, job, prompt, seed, lambda: progress.update(1)))
            if job.count > 1 and is_file(output):
                continue  # they are on the sheet alone
            told = job.metadata(prompt, seed)
            path = output if is_file(output) else free_path(output / file_name(prompt, seed), told)
            write_drawn(path, drawn[-1], told)
            print(path)
    width = len(job.seeds)
    return [drawn[start : start + width] for start in range(0, len(drawn), width)]


def is_file(output: Path) -> bool:
    """Is one file asked for, rather than a folder?"""
    return output.suffix.lower() == ".png"


def check_output(output: Path) -> None:
    """Raise UserError where the pictures could not be written."""
    if output.suffix.lower() in OTHER_KINDS and not output.is_dir():
        raise UserError(
            f"--output {output}: pictures are PNG files, which say how they were drawn; give a "
            f"name such as {output.with_suffix('.png')}, or a folder"
        )
    if is_file(output) and output.is_dir():
        raise UserError(f"--output {output} is a folder; give a file's name, or another folder")
    if not is_file(output) and output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder, or a name that ends in .png")


def file_name(prompt: str, seed: int) -> str:
    """Name a picture after what it shows."""
    slug = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:SLUG].rstrip("-") or "picture"
    return f"{slug}-seed{seed}.png"


def free_path(path: Path, told: Mapping[str, str]) -> Path:
    """`path`, or the next with a number behind that holds no picture drawn in another way."""
    for number in range(1, 1_000_000):
        one = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        if not one.exists() or settings_in(one) == told:
            return one
    raise UserError(f"{path.parent} is full of pictures of this prompt; give another --output")


def settings_in(path: Path) -> Mapping[str, str] | None:
    """How a picture was drawn, as its file says; None for another's."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return {name: str(text) for name, text in image.text.items()}  # type: ignore[attr-defined]
    except (OSError, ValueError, AttributeError):
        return None


def note_truncated(pipe: Any, job: Job) -> None:
    """Say which prompts are longer than the text encoders read."""
    most = pipe.tokenizer.model_max_length
    for prompt in job.prompts:
        if len(pipe.tokenizer(prompt, verbose=False).input_ids) > most:
            print(f"note: only the first {most} tokens are read of: {prompt}", file=sys.stderr)


def note_guidance(job: Job) -> None:
    """Say where a student is told a guidance that it was not trained with."""
    known = job.choice.sampling.known_guidance
    if known is not None and not known[0] <= job.guidance_scale <= known[1]:
        print(
            f"note: {job.choice.name} was trained with guidance_scale {known[0]:g} to "
            f"{known[1]:g}; what {job.guidance_scale:g} draws is a guess",
            file=sys.stderr,
        )
