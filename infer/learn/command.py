"""`infer learn`: a picture becomes a LoRA that draws it."""

from __future__ import annotations

import sys
from pathlib import Path

from infer.config import LearnConfig, LearnFlags
from infer.learn import redrawn
from infer.learn.recipe import Recipe, claim, recipe_of
from infer.learn.stages import is_learned, make_cache, train_lora
from infer.pictures.read import content, framed
from infer.pipelines.adapters import load_with_adapters
from infer.pipelines.timing import seconds_per_pass
from shared.errors import UsageError
from shared.machine.device import pick_device, set_threads
from shared.models.family import Model, model_name, resolve_model, vae_downscale
from shared.networks.denoiser import load_unet
from shared.wording import counted, duration

FORWARD_AND_BACK = 3.5  # a step through frozen weights and a LoRA, in passes without gradients


def learn(config: LearnConfig) -> int:
    """Learn a picture, unless it has been learned; measure the result, and print where it is.

    Returns the exit status. Raises UserError, before anything is written, for what is no picture,
    and UsageError where the prompt is missing.
    """
    picture = config.picture
    if picture is None:
        raise UsageError(
            "which picture? For example: python -m infer learn cat.jpg --prompt 'a photo of a cat'"
        )
    if not (config.prompt or "").strip():
        raise UsageError(f"what does {picture} show? Say it: --prompt 'a photo of a cat'")
    assert config.prompt is not None
    set_threads(config.threads)
    model = resolve_model(config.model)
    recipe = recipe_of(config, model, picture, config.prompt, config.steps)
    run = config.output or recipe.folder()
    status = learn_picture(config, model, recipe, picture, run)
    if status == 0:
        print(run)
    return status


def learn_picture(
    flags: LearnFlags, model: Model, recipe: Recipe, picture: Path, run: Path
) -> int:
    """Let a run learn a picture and measure what it has learned; what is there is kept.

    Returns 130 where Ctrl-C came, and the same command goes on; else 0.
    """
    claim(run, recipe)
    if is_learned(flags, recipe, run):
        print(f"{picture} has been learned: {run}", file=sys.stderr)
    else:
        print(plan(flags, recipe, picture, run), file=sys.stderr)
        print(f"this takes about {duration(seconds(flags, model, recipe))}", file=sys.stderr)
        data = content(picture, "picture")
        make_cache(flags, recipe, data, run)
        if status := train_lora(flags, recipe, run):
            return status
        if not is_learned(flags, recipe, run):
            return 0  # SIGTERM: what there is, is saved
    if not (run / redrawn.SHEET).exists():
        measure(flags, model, recipe, picture, run)
    return 0


def plan(flags: LearnFlags, recipe: Recipe, picture: Path, run: Path) -> str:
    """What will be done, in a line."""
    return (
        f"learn {picture} as {recipe.prompt!r}: a LoRA of rank {recipe.rank} for "
        f"{model_name(flags.model)}, {counted(recipe.steps, 'step')} of "
        f"{recipe.train_batch_size} noises at {recipe.resolution} px, on "
        f"{pick_device(flags.device).type}, into {run}"
    )


def seconds(flags: LearnFlags, model: Model, recipe: Recipe) -> float:
    """About how long learning takes, by a pass that is measured here."""
    unet = load_unet(model.source).to(pick_device(flags.device))
    side = recipe.resolution // vae_downscale(model.source)
    one = seconds_per_pass(unet, side, recipe.train_batch_size)
    return recipe.steps * FORWARD_AND_BACK * one + 4 * redrawn.STEPS * one


def measure(flags: LearnFlags, model: Model, recipe: Recipe, picture: Path, run: Path) -> None:
    """Draw the picture with what was learned; say how near that comes, and show it."""
    pipe = load_with_adapters(flags, [run])
    pixels = framed(content(picture, "picture"), recipe.resolution)
    found = redrawn.redraw(pipe, model, recipe, pixels)
    redrawn.write(run / redrawn.SHEET, found, recipe.prompt)
    print(f"{found}: {run / redrawn.SHEET}", file=sys.stderr)
