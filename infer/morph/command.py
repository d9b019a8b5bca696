"""`infer morph`: two pictures become frames that lead from one to the other."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from infer.config import MorphConfig
from infer.learn.lesson import Lesson, seconds_of
from infer.morph.frames import Morph, draw_frames
from infer.morph.job import Job, plan_job
from infer.morph.spacing import distances, unevenness
from infer.pictures.film import EXTRA, gif_of, write_mp4, writes_mp4
from infer.pictures.write import write_drawn, write_sheet
from infer.pipelines.adapters import bare_unet, load_with_adapters
from infer.pipelines.timing import seconds_per_pass
from shared.cli.progress import Progress
from shared.machine.device import set_threads
from shared.models.family import model_name, vae_downscale
from shared.storage.files import beside, check_free, dump_json, move, publish, workshop
from shared.wording import duration

STRIP = 8  # frames in the strip, at most
WITH_LORAS = 1.5  # a pass with two LoRAs beside the weights, in those without


def morph(config: MorphConfig) -> int:
    """Learn both pictures, draw the frames, and print where they are.

    Returns the exit status; where Ctrl-C came while something was learned, the same command goes
    on. Raises UsageError and UserError before anything is written.
    """
    set_threads(config.threads)
    job = plan_job(config)
    todo = [one for one in job.lessons if config.learn and not one.learned()]
    print(job, file=sys.stderr)
    for lesson in todo:
        print(lesson, file=sys.stderr)
    if not writes_mp4():
        print(f"note: no MP4 is written, which needs {EXTRA}", file=sys.stderr)
    print(f"this takes about {duration(seconds(job, todo))}", file=sys.stderr)
    for lesson in job.lessons if config.learn else ():
        if status := lesson.learn():
            return status
        gc.collect()
    pipe = load_with_adapters(config, job.runs)
    with Progress("morph", job.drawings * job.way.steps, "step") as progress:
        drawn = draw_frames(pipe, job, lambda: progress.update(1))
    write(job, drawn)
    print(told(drawn), file=sys.stderr)
    print(job.output)
    return 0


def seconds(job: Job, todo: list[Lesson]) -> float:
    """About how long learning and drawing take."""
    unet = bare_unet(job.config, job.model)
    side = job.lessons[0].recipe.resolution // vae_downscale(job.model.source)
    one = seconds_per_pass(unet, side, side) * (WITH_LORAS if job.config.learn else 1)
    return seconds_of(todo, unet) + job.drawings * job.way.steps * one


def told(drawn: Morph) -> str:
    """How near the ends are to the pictures, and how even the way is."""
    first, last = drawn.psnr()
    return (
        f"the ends are {first:.1f} and {last:.1f} dB from the VAE's own reconstructions; the "
        f"largest step between frames is {unevenness(drawn.pictures):.2f} of the mean one"
    )


def write(job: Job, drawn: Morph) -> None:
    """Write everything into a folder, which appears when all of it is there."""
    output, fps = job.output, job.config.fps
    with beside(output) as tmp, workshop(tmp, "-morph") as building:
        for number, (a, pixels) in enumerate(drawn.frames.items()):
            write_drawn(building / "frames" / f"{number:03d}.png", pixels, metadata(job, a))
        write_strip(building / "strip.png", drawn)
        publish([gif_of(drawn.pictures, fps)], building / "morph.gif", building)
        if writes_mp4():
            write_mp4(building / "morph.mp4", drawn.pictures, fps)
        publish([dump_json(record(job, drawn))], building / "morph.json", building)
        check_free(output)  # still
        if output.is_dir():
            output.rmdir()
        move(building, output)


def write_strip(path: Path, drawn: Morph) -> None:
    """Write some of the frames side by side, both ends among them."""
    frames = list(drawn.frames.items())
    count = min(STRIP, len(frames))
    shown = [frames[round(at)] for at in np.linspace(0, len(frames) - 1, count)]
    write_sheet(path, [[pixels for _, pixels in shown]], [f"{a:.2f}" for a, _ in shown], [""])


def metadata(job: Job, a: float) -> Mapping[str, str]:
    """What a frame's file says of it; no path of this machine."""
    first, last = job.lessons
    return {
        "morph": f"{first.picture.name} to {last.picture.name} at {a:.4f}",
        "prompts": f"{first.recipe.prompt} | {last.recipe.prompt}",
        "model": model_name(job.config.model),
    }


def record(job: Job, drawn: Morph) -> dict[str, Any]:
    """How the frames came about, and what was measured."""
    config = job.config
    named = ("frames", "steps", "learn", "adain", "attention", "reschedule")
    return {
        **{name: getattr(config, name) for name in named},
        "model": model_name(config.model),
        "pictures": [one.picture.name for one in job.lessons],
        "prompts": [one.recipe.prompt for one in job.lessons],
        "places": list(drawn.frames),
        "distances": distances(drawn.pictures).tolist(),
        "unevenness": unevenness(drawn.pictures),
        "psnr": list(drawn.psnr()),
    }
